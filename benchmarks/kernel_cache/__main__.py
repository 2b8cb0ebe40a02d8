"""Fills, packs and unpacks a cache of kernels; see the docstring of the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.kernel_cache.entries import Entries, pack, report, unpack


def fill(folder: Path, names: Sequence[str], only: Sequence[str], processes: int, seconds: float) -> int:
    """Compile what is not in the cache yet, job after job; no job begins after `seconds`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder.absolute())  # of the processes
    from benchmarks.kernel_cache.launches import compiled, jobs
    from lightning_optim.core.optimizer import OPTIMIZERS

    begin, problems = time.monotonic(), 0
    entries = Entries()
    waiting = [job for job in jobs(names or sorted(OPTIMIZERS)) if not only or job[0] in only]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {}
        while waiting or running:
            while waiting and len(running) < processes and time.monotonic() - begin < seconds:
                job = waiting.pop(0)
                running[pool.submit(compiled, *job)] = job
            if not running:
                break
            done = next(as_completed(running))
            what, name = running.pop(done)
            if error := done.exception():
                problems += 1
                print(f"{what} {name}: {type(error).__name__}: {error}", flush=True)
                continue
            found, took, failed = done.result()
            entries.add([found])
            entries.write(folder)
            problems += len(failed)
            counts = f"{len(found.kernels)} kernels, {len(found.modules)} modules, {took:.0f} s"
            print(f"{what} {name}: {counts}, {len(entries.kernels)} in all", *failed, sep="\n  ", flush=True)
    for what, name in waiting:
        print(f"not begun: {what} {name}")
    return int(problems > 0)


def main(args: Sequence[str] | None = None) -> int:
    """Do what the first word says; 1 where something could not be compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    filling = commands.add_parser("fill", help="compile kernels into a folder")
    filling.add_argument("folder", type=Path)
    filling.add_argument("--optimizers", nargs="+", default=[], help="by default all, the raced ones first")
    filling.add_argument("--only", nargs="+", default=[], choices=("race", "steps", "checks", "ranks"))
    filling.add_argument("--jobs", type=int, default=2, help="processes")
    filling.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new begins")
    packing = commands.add_parser("pack", help="pack a filled folder")
    packing.add_argument("folder", type=Path)
    packing.add_argument("archive", type=Path)
    unpacking = commands.add_parser("unpack", help="unpack on the machine with the GPU")
    unpacking.add_argument("archive", type=Path)
    unpacking.add_argument("folder", type=Path)
    reporting = commands.add_parser("report", help="what was compiled beside what the cache held")
    reporting.add_argument("folder", type=Path)
    given = parser.parse_args(args)
    if given.command == "fill":
        return fill(given.folder, given.optimizers, given.only, given.jobs, given.seconds)
    if given.command == "pack":
        found = pack(given.folder, given.archive)
    else:
        found = unpack(given.archive, given.folder) if given.command == "unpack" else report(given.folder)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
