"""Measures the step of every optimizer on a CPU: `python -m benchmarks.cpu --budget 600`.

The steps of each optimizer alternate with those of `torch.optim.AdamW(fused=True)` on the same tensors. The result is
the ratio of the two medians. Each result is saved at once, and the same command continues where the budget ended.
Tables and a picture are written next to the raw results; `--page` writes the table of goals to docs/speed.md.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import cpu_report
from benchmarks.cpu_contenders import PACKAGES, Entry, base, others, ours
from benchmarks.pages import RESULTS, write_part
from benchmarks.pairs import bandwidths, measure
from benchmarks.records import Record, commit, load, machine, save
from benchmarks.shapes import Shape, gpt2_124m, tiny, two_million
from lightning_optim import OptionError
from lightning_optim.core.optimizer import OPTIMIZERS

CASES: dict[str, tuple[str, Callable[[], list[Shape]]]] = {
    "a": ("200 tensors, 2.0 M parameters", two_million),
    "b": ("GPT-2, 124 M parameters", gpt2_124m),
    "c": ("10,000 tensors of ten elements", lambda: [(10,)] * 10_000),
    "tiny": ("tiny", tiny),
}


def entries(optimizers: Sequence[str], engines: Sequence[str], packages: Sequence[str]) -> list[Entry]:
    """All that are measured on a list of tensors, those of one method together; says who cannot take part."""
    found = []
    for name in optimizers:
        found += [entry for engine in engines for entry in ours(name, engine)]
        rivals, absent = others(name, packages)
        found += rivals
        for label, reason in absent.items():
            print(f"{label}: {reason}")
    return found


def row(entry: Entry, shapes: Sequence[Shape], rounds: int, longest: float) -> Record:
    """What is measured of one contender, or why it could not be."""
    contender = entry.contender
    facts = {"optimizer": entry.optimizer, "package": entry.package, "bits": contender.bits, "engine": entry.engine}
    try:
        measured = measure(shapes, base().make, contender.make, rounds, longest, entry.warm)
    except OptionError as error:
        if contender.ours and entry.engine != "auto":
            return {**facts, "failed": str(error)}  # an engine that does not serve this one
        raise
    except Exception as error:  # a peer that does not work here must not end the measurement
        if contender.ours:
            raise
        traceback.print_exc()
        return {**facts, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return {**facts, "code": commit(), **measured}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = sorted(OPTIMIZERS)
    parser.add_argument("--cases", nargs="+", default=["a", "b"], choices=CASES)
    parser.add_argument("--optimizers", nargs="+", default=words, choices=words)
    parser.add_argument("--engines", nargs="+", default=["auto", "blocked"], help="of ours; auto is what a user gets")
    parser.add_argument("--packages", nargs="*", default=list(PACKAGES), choices=PACKAGES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--longest", type=float, default=60, help="seconds for one contender, but three rounds")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no contender begins")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure also what is in the results")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="tables and picture go beside it")
    parser.add_argument("--page", action="store_true", help="write the table of goals into docs/speed.md")
    given = parser.parse_args(args)
    end = time.monotonic() + given.budget
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # of the peers
    found = load(given.out, machine())
    everyone = entries(given.optimizers, given.engines, given.packages)
    for case in given.cases:
        title, shapes = CASES[case][0], CASES[case][1]()
        numbers = sum(map(math.prod, shapes))
        piece = found.setdefault("cases", {}).setdefault(
            case, {"title": title, "parameters": numbers, "tensors": len(shapes), "bandwidth": [], "rows": {}}
        )
        todo = [entry for entry in everyone if given.again or entry.key not in piece["rows"]]
        if todo and time.monotonic() < end:
            piece["bandwidth"].append(bandwidths(4 * numbers))  # as many values as a step of AdamW works on
        for entry in todo:
            if time.monotonic() > end:
                print(f"the budget is spent before {case}/{entry.key}; the same command continues there")
                break
            begin = time.monotonic()
            piece["rows"][entry.key] = new = row(entry, shapes, given.rounds, given.longest)
            gc.collect()
            save(given.out, found)
            said = f"{new['times_base']:.2f}" if "times_base" in new else new["failed"]
            print(f"{case}/{entry.key}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    given.out.with_suffix(".md").write_text(cpu_report.full(found) + "\n")
    cpu_report.picture(found, given.out.with_suffix(".png"))
    print(cpu_report.goals(found))
    if given.page:
        write_part("speed.md", "cpu", cpu_report.goals(found))


if __name__ == "__main__":
    main()
