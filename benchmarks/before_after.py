"""Compares the steps of two commits on a CPU: `python -m benchmarks.before_after BEFORE`.

BEFORE is a checkout of an older commit. Runs of `benchmarks.cpu` in it and in this checkout alternate, each in its own
process. The result of a run is its ratio to `torch.optim.AdamW(fused=True)`. The report holds the medians of these
ratios, and their quotient.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.pages import RESULTS
from benchmarks.records import commit, machine, save

ROOT = Path(__file__).parents[1]


def ratio(checkout: Path, case: str, optimizer: str, rounds: int) -> float:
    """The step time of an optimizer in a checkout, in steps of torch's fused AdamW."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "cpu.json")
        command = [sys.executable, "-m", "benchmarks.cpu", "--cases", case, "--optimizers", optimizer]
        command += ["--engines", "auto", "--packages", "--rounds", str(rounds), "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
        rows = json.loads(out.read_text())["cases"][case]["rows"].values()
    (found,) = [row["times_base"] for row in rows if row["bits"] == 32]
    return float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--cases", nargs="+", default=["a", "b"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "adan", "lamb"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "before_after.json")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as the runs do, for the record
    checkouts = {"before": given.before.resolve(), "after": ROOT}
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=given.before, check=True, capture_output=True, text=True
    )
    found = {**machine(), "before": head.stdout.strip(), "after": commit(), "ratios": {}}
    for case in given.cases:
        for optimizer in given.optimizers:
            ratios: dict[str, list[float]] = {"before": [], "after": []}
            for _ in range(given.repeats):
                for when, checkout in checkouts.items():
                    ratios[when].append(ratio(checkout, case, optimizer, given.rounds))
            before, after = (statistics.median(ratios[when]) for when in checkouts)
            found["ratios"][f"{case}/{optimizer}"] = {**ratios, "quotient": after / before}
            print(f"{case}/{optimizer}: {before:.3f} before, {after:.3f} after, {after / before:.3f}", flush=True)
            save(given.out, found)


if __name__ == "__main__":
    main()
