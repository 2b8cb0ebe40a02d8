"""Race every optimizer and recipe on two tasks, and keep the curves: of them docs draws a picture for each optimizer.

    python -m benchmarks.optimizer_curves --folder /tmp/races

The digits for 10 epochs, and a language model of two blocks for 200 steps: each optimizer with its default options, a
cosine schedule, and the best of three learning rates around its own (`lightning-optim compare`), of four on the digits
if the best of three lies at the edge. One thread; about ten minutes. What was stopped goes on with the same folder, and
seeds may be added. `benchmarks/results/optimizer_curves.json` is the result, and `optimizer_races.json` the tables with
what can be said.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console

from lightning_optim import compare, list_optimizers
from lightning_optim.race.comparison import Comparison
from lightning_optim.race.outcome import thinned
from lightning_optim.race.progress import Bar

RESULTS = Path(__file__).parent / "results"
MOST_POINTS = 50  # of a curve
REFERENCE = "adamw"

CONFIGS = {
    "digits": [
        *("--config", "examples/digits/adan.yaml", "--trainer.callbacks", "null"),
        *("--model.optimizer", "{name: adamw, lr: 0.003, schedule: cosine}"),
    ],
    "language_model": [
        *("--config", "examples/language_model/transformer.yaml", "--trainer.callbacks", "null"),
        *("--model.optimizer", "{name: adamw, lr: 0.003, schedule: {name: cosine, warmup_steps: 20}}"),
        *("--model.depth", "2", "--model.width", "32"),
    ],
}
LENGTHS: dict[str, dict[str, int]] = {  # and how many more learning rates where the best lies at the edge of the grid
    "digits": {"epochs": 10, "extend": 1},
    "language_model": {"steps": 200, "extend": 0},
}
TASKS = [
    {
        "name": "digits",
        "title": "digits, 10 epochs",
        "x": "step",
        "y": "validation loss",
        "metric": "validation accuracy",
        "better": "higher",
    },
    {
        "name": "language_model",
        "title": "language model, 200 steps",
        "x": "step",
        "y": "training loss",
        "metric": "validation loss",
        "better": "lower",
    },
]


def race(task: str, folder: Path, seeds: int) -> Comparison:
    """The comparison of one task, of which the folder keeps the runs."""
    names = [REFERENCE, *(name for name in list_optimizers() if name != REFERENCE)]
    bar = Bar(Console(stderr=True))
    terms: dict[str, Any] = {"seeds": seeds, **LENGTHS[task]}
    return compare(names, CONFIGS[task], folder=folder / task, progress=bar, **terms)


def runs(task: dict[str, str], found: Comparison) -> list[dict[str, Any]]:
    """The runs of each candidate at its best learning rate, as docs/parts/curves.py reads them."""
    curve = {"validation loss": "val/loss", "training loss": "training loss"}[task["y"]]
    metric = {"validation loss": "val/loss", "validation accuracy": "val/accuracy"}[task["metric"]]
    kept = []
    for standing in found.standings:
        for seed, outcome in standing.outcomes.items():
            x, y = thinned(outcome.curves.get(curve, ([], [])), MOST_POINTS)
            points = [(int(a), float(f"{b:.4g}")) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
            end = math.nan if outcome.failure(metric) else outcome.metrics[metric]
            lr = standing.best.lr if standing.best else math.nan
            kept.append(
                {
                    **{"task": task["name"], "optimizer": standing.name, "options": {"lr": float(f"{lr:.4g}")}},
                    **{"seed": seed, "x": [a for a, _ in points], "y": [b for _, b in points]},
                    "metric": float(f"{end:.5g}") if math.isfinite(end) else None,
                }
            )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Race every optimizer and recipe on two tasks, and keep the curves.")
    parser.add_argument("--folder", type=Path, default=Path("races"), help="where runs are kept, and continued")
    parser.add_argument("--seeds", type=int, nargs=2, default=[2, 1], help="of the digits, and of the language model")
    parser.add_argument("--task", choices=list(CONFIGS), help="run this one, and write nothing")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    wanted = [given.task] if given.task else list(CONFIGS)
    found = {task: race(task, given.folder, given.seeds[list(CONFIGS).index(task)]) for task in wanted}
    print(*(f"{comparison}\n" for comparison in found.values()), sep="\n")
    if given.task:
        return
    about = {
        "command": "python -m benchmarks.optimizer_curves",
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores of which one thread was used",
    }
    kept = [run for task in TASKS for run in runs(task, found[task["name"]])]
    curves = {"about": about, "tasks": TASKS, "runs": kept}
    (RESULTS / "optimizer_curves.json").write_text(json.dumps(curves) + "\n")
    tables = {task: comparison.data() for task, comparison in found.items()}
    (RESULTS / "optimizer_races.json").write_text(json.dumps({"about": about, "races": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
