"""Train the language model with both places of the layer norms, with and without a warm-up, from the same seeds.

python -m examples.language_model.warm_up                # 24 runs, which write warm_up.json, then the picture
python -m examples.language_model.warm_up --draw         # the picture alone, warm_up.png, from warm_up.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from examples.language_model.language_model import LanguageModel, SourceText

FOLDER = Path(__file__).parent
LRS = (3e-3, 1e-3)
WARM_UP = 100
SEEDS = (0, 1, 2)
NORMS: tuple[Literal["pre", "post"], ...] = ("pre", "post")
Runs = list[dict[str, Any]]


class Losses(Callback):
    """The training loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(round(outputs["loss"].item(), 4))


def train(lr: float, norm: Literal["pre", "post"], warm_up: int, seed: int, steps: int) -> dict[str, Any]:
    """One run, and its losses."""
    seed_everything(seed, verbose=False)
    schedule = {"name": "constant", "warmup_steps": warm_up}
    model = LanguageModel(norm, optimizer={"name": "adamw", "lr": lr, "schedule": schedule})
    losses = Losses()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun = time.perf_counter()
    trainer.fit(model, SourceText(batches=steps, seed=seed))
    seconds = round(time.perf_counter() - begun, 1)
    val = round(float(trainer.callback_metrics["val/loss"]), 4)
    arm = {"lr": lr, "norm": norm, "warm_up": warm_up, "seed": seed}
    return {**arm, "seconds": seconds, "val_loss": val, "losses": losses.values}


def arms(runs: Runs) -> list[Runs]:
    """The runs by learning rate, norm and warm-up; in each of them one for each seed."""
    found: dict[tuple[Any, ...], Runs] = {}
    for run in runs:
        found.setdefault((run["lr"], run["norm"], run["warm_up"]), []).append(run)
    return list(found.values())


def cells(arm: Runs) -> list[str]:
    """A row of the table: what the arm is, and its validation losses at the end."""
    losses = [run["val_loss"] for run in arm]
    warm_up = f"{arm[0]['warm_up']} steps" if arm[0]["warm_up"] else "none"
    return [str(arm[0]["lr"]), arm[0]["norm"], warm_up, *(f"{x:.2f}" for x in (*losses, statistics.median(losses)))]


def table(runs: Runs) -> Table:
    """The validation losses at the end."""
    found = Table("lr", "norm", "warm-up", *(f"seed {seed}" for seed in SEEDS), "median")
    for arm in arms(runs):
        found.add_row(*cells(arm))
    return found


def draw(runs: Runs, path: Path) -> None:
    """The training losses, each the mean of ten steps: one curve for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    rows = figure.subplots(len(LRS), len(NORMS), sharex=True, sharey=True)
    axes = dict(zip(itertools.product(LRS, NORMS), (axis for row in rows for axis in row), strict=True))
    for run in runs:
        losses, warm_up = run["losses"], run["warm_up"]
        means = [statistics.mean(losses[i : i + 10]) for i in range(0, len(losses), 10)]
        label = (f"warm-up of {warm_up} steps" if warm_up else "no warm-up") if run["seed"] == SEEDS[0] else None
        color = "tab:blue" if warm_up else "tab:red"
        axes[run["lr"], run["norm"]].plot(range(10, 10 * len(means) + 1, 10), means, color=color, label=label)
    for (lr, norm), axis in axes.items():
        axis.set_title(f"{norm.capitalize()}-LN, learning rate {lr}")
        axis.legend()
        axis.set_xlabel("step" if lr == LRS[-1] else "")
        axis.set_ylabel("training loss, nats per byte" if norm == NORMS[0] else "")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with and without a warm-up.")
    parser.add_argument("--draw", action="store_true", help="draw warm_up.json again")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=FOLDER / "warm_up.json")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if not args.draw:
        runs = [train(*arm, args.steps) for arm in itertools.product(LRS, NORMS, (0, WARM_UP), SEEDS)]
        about = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        args.out.write_text(json.dumps({"about": about, "runs": runs}) + "\n")
    runs = json.loads(args.out.read_text())["runs"]
    Console().print(table(runs))
    draw(runs, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
