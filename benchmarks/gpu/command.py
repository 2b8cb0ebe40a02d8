"""The command of the benchmark: which pieces run, what is saved, and the page that is made from it."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contenders import NAMES
from benchmarks.gpu import processes, report
from benchmarks.gpu.plan import pieces
from benchmarks.gpu.processes import Outcome, Piece
from benchmarks.gpu.setting import Result, Setting
from benchmarks.pages import RESULTS, write_part
from benchmarks.peers import versions
from benchmarks.records import commit, save

ABOUT = """Checks and measures the Triton engine on a GPU: `python -m benchmarks.gpu --budget 480`.

The benchmark consists of pieces, the most telling first. Each runs in a process of its own, and is saved when it is
done, under the name of the device. The same command continues where the budget ended, and tries what failed once more
at the end. `--render` makes the page from results that were measured elsewhere. `--tiny` runs the same code with small
sizes in Triton's interpreter, on a machine without a GPU (TRITON_INTERPRET=1)."""


def about(setting: Setting) -> Result:
    """The device and the versions. It runs in a process of its own: a process that has used CUDA cannot be forked."""
    found: Result = {"device": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
    if setting.on_gpu:
        import triton

        torch.ones(1, device=setting.device, dtype=torch.float32).add_(1)
        found |= {"device": torch.cuda.get_device_name(setting.device), "triton": triton.__version__}
        found["cuda"] = torch.version.cuda
    return {**found, "peers": versions()}


def seen(setting: Setting) -> tuple[Result, str]:
    """What `about` says, and how processes start here.

    Raises:
        SystemExit: where no device can be used.
    """
    piece, failed = Piece("about", about, limit=90), ""
    for method in ("fork", "spawn"):
        for _, outcome in processes.run([piece], setting, math.inf, method):
            if outcome.result is not None:
                return outcome.result, method
            failed = outcome.failed
    raise SystemExit(f"no GPU can be used ({failed}); --tiny runs on a CPU, with TRITON_INTERPRET=1")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    found = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new piece starts")
    found.add_argument("--tiny", action="store_true", help="small sizes, for the interpreter on a CPU")
    found.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="raw results; tables are written beside")
    found.add_argument("--only", nargs="+", default=[""], help="run only pieces whose names start with one of these")
    found.add_argument("--without", nargs="+", default=[], help="run no pieces whose names start with one of these")
    found.add_argument("--optimizers", nargs="+", default=list(NAMES), choices=NAMES, help="those that are raced")
    found.add_argument("--rounds", type=int, default=10, help="visits to each contender of a race")
    found.add_argument("--jobs", type=int, help="pieces without a clock that run at a time; 3/4 of the cores")
    found.add_argument("--commit", help="the commit of the code, where git cannot tell")
    found.add_argument("--render", nargs="+", type=Path, metavar="FILE", help="only write the page, from these results")
    found.add_argument("--page", action="store_true", help="write the tables to docs/gpu.md")
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Run what is not in the results yet; 1 where a check failed or a piece has no result."""
    given = parser().parse_args(args)
    if given.render:
        return _render(given.render)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not use it in this process
    warnings.simplefilter("ignore")  # of the peers' imports
    jobs = given.jobs or (1 if given.tiny else max(1, 3 * (os.cpu_count() or 2) // 4))
    setting = Setting(given.tiny, given.rounds, jobs, tuple(given.optimizers))
    end = time.monotonic() + given.budget
    device, method = seen(setting)
    everything: Result = json.loads(given.out.read_text()) if given.out.exists() else {}
    mine = everything.setdefault(device["device"], {"about": device, "pieces": {}, "failed": {}})
    if mine["about"] != device:
        raise SystemExit(f"{given.out} was measured with other versions on this device; set another --out")
    measured_with = {"commit": given.commit or commit()}

    def told(name: str, outcome: Outcome) -> None:
        print(f"{name}: {outcome.failed or 'done'}, {outcome.seconds:.1f} s", flush=True)
        mine["failed"].pop(name, None)
        if outcome.result is None:
            mine["failed"][name] = outcome.failed
        else:
            mine["pieces"][name] = {**outcome.result, **measured_with, "took_s": round(outcome.seconds, 1)}
        save(given.out, everything)
        given.out.with_suffix(".md").write_text(report.page(everything) + "\n")

    names = tuple(given.only), tuple(given.without)
    wanted = [piece for piece in pieces(setting) if piece.name.startswith(names[0])]
    wanted = [piece for piece in wanted if not given.without or not piece.name.startswith(names[1])]
    left = sorted((p for p in wanted if p.name not in mine["pieces"]), key=lambda piece: piece.name in mine["failed"])
    begun = set()
    for name, outcome in processes.run(left, setting, end, method):
        begun.add(name)
        told(name, outcome)
    if unbegun := [piece.name for piece in left if piece.name not in begun]:
        print(f"the budget is spent before {unbegun[0]}; the same command continues there")
    print(report.page(everything))
    if given.page:
        write_part("gpu.md", "measurements", report.page(everything))
    wrong = any(piece.get("failed") for name, piece in mine["pieces"].items() if name.startswith("checks/"))
    if mine["failed"]:
        print(f"without a result: {', '.join(mine['failed'])}", file=sys.stderr)
    return int(wrong or bool(mine["failed"]))


def _render(files: Sequence[Path]) -> int:
    """Write docs/gpu.md from result files; of two results of a piece on one device the later file's counts."""
    everything: Result = {}
    for file in files:
        for device, found in json.loads(file.read_text()).items():
            mine = everything.setdefault(device, {"about": found["about"], "pieces": {}, "failed": {}})
            for name, piece in found["pieces"].items():
                mine["pieces"][name] = piece
                mine["failed"].pop(name, None)
            mine["failed"] |= {name: why for name, why in found["failed"].items() if name not in mine["pieces"]}
    write_part("gpu.md", "measurements", report.page(everything))
    return 0
