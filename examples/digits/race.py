"""Train the digits with every optimizer and recipe, one after another, and show them side by side.

python -m examples.digits.race                      # all of them, at the setting that each page recommends
python -m examples.digits.race adan adamw --epochs 5
python -m examples.digits.race --out benchmarks/results/digits_race.json
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from examples.digits.digits import DigitsClassifier, DigitsData
from lightning_optim import OptimizerStrategy, list_optimizers


def train(name: str, epochs: int, seed: int, **options: Any) -> dict[str, Any]:
    """One run; losses and accuracies at its end."""
    seed_everything(seed, verbose=False)
    recommended = {**OptimizerStrategy(name).optimizer_class.recommended, **options}
    model, data = DigitsClassifier({"name": name, **recommended}), DigitsData()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - begun
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    return {"name": name, "options": recommended, "seconds": seconds, **found, **tested}


def table(runs: list[dict[str, Any]]) -> Table:
    """The runs side by side, the best test accuracy first."""
    found = Table("optimizer", "setting", title="Digits")
    for column in ("train loss", "val loss", "val accuracy", "test accuracy", "seconds"):
        found.add_column(column, justify="right")
    for run in sorted(runs, key=lambda run: -run["test/accuracy"]):
        setting = ", ".join(f"{key}={value}" for key, value in run["options"].items()) or "defaults"
        keys = ("train/loss", "val/loss", "val/accuracy", "test/accuracy", "seconds")
        found.add_row(run["name"], setting, *(f"{run[key]:.4g}" for key in keys))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Race optimizers on the digits.")
    parser.add_argument("names", nargs="*", help="words of a config; all by default")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the runs as JSON")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    runs = [train(name, args.epochs, args.seed) for name in args.names or list_optimizers()]
    Console(width=140).print(table(runs))
    if args.out:
        about = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "epochs": args.epochs,
            "seed": args.seed,
        }
        args.out.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
