"""What the callbacks that look at training cost, on the digits and a language model, and the pictures of their pages.

    python -m benchmarks.looks [PART ...]

Writes benchmarks/results/looks.json and docs/pictures/.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from typing_extensions import override

from benchmarks.pictures import new_figure, save_figure
from examples.digits.digits import DigitsClassifier, DigitsData
from examples.language_model.language_model import LanguageModel, SourceText
from lightning_optim.analysis.density import smoothed
from lightning_optim.callbacks import CurvatureMonitor, CurvatureSchedule, LocalGeometry
from lightning_optim.callbacks.looking_callback import LookingCallback
from lightning_optim.reports.local_geometry import ratio_at_equal_loss, trajectories

ROOT = Path(__file__).parents[1]
ALL = 1297  # images for training
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.03, "momentum": 0.9}
ADAMW: dict[str, Any] = {"name": "adamw", "lr": 0.003}


class Times(Callback):
    """Seconds of each training step and of each look."""

    def __init__(self, looking: LookingCallback) -> None:
        self.steps: list[float] = []
        self.looks: list[float] = []
        attempt = looking.attempt

        def timed(trainer: Trainer) -> None:
            begin = time.perf_counter()
            attempt(trainer)
            self.looks.append(time.perf_counter() - begin)

        vars(looking)["attempt"] = timed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(time.perf_counter() - self._begin)


class Losses(Callback):
    """The validation loss after each epoch."""

    def __init__(self) -> None:
        self.found: list[tuple[int, float]] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def run(optimizer: Any, steps: int, *callbacks: Callback, batch_size: int = 64, language: bool = False) -> None:
    """Train a small network on the digits, or the language model of the examples."""
    seed_everything(0, verbose=False)
    module: LightningModule = DigitsClassifier(optimizer, width=4)
    data: LightningDataModule = DigitsData(batch_size)
    if language:
        module, data = LanguageModel(optimizer=optimizer), SourceText()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options.update(accelerator="cpu", max_steps=steps, max_epochs=-1, enable_model_summary=False)
    if not any(isinstance(callback, Losses) for callback in callbacks):
        options.update(limit_val_batches=0)
    Trainer(callbacks=list(callbacks), num_sanity_val_steps=0, **options).fit(module, data)


def cost(optimizer: Any, looking: LookingCallback, language: bool = False) -> dict[str, float]:
    """Seconds of a look and of a step, and the share of the time at the default interval of 1000 steps."""
    times = Times(looking)
    run(optimizer, 20, looking, times, language=language)  # in this order: a step ends before its look begins
    times.steps = sorted(times.steps)
    look, step = statistics.median(times.looks[1:]), statistics.median(times.steps)
    return {"look_s": look, "step_s": step, "steps_per_look": look / step, "share_at_1000": look / (1000 * step)}


def monitor_picture() -> dict[str, float]:
    """Stability of three runs, and the density at the end of the first."""
    runs = {
        "SGD, all images in a step": ({"name": "sgd", "lr": 0.1}, ALL),
        "SGD, batches of 64": ({"name": "sgd", "lr": 0.1}, 64),
        "AdamW, all images in a step": (ADAMW, ALL),
    }
    figure, (left, right) = new_figure(1, 2, 10, 4)
    last: dict[str, float] = {}
    for name, (optimizer, batch) in runs.items():
        monitor = CurvatureMonitor(every_n_steps=20, steps=8, probes=1)
        run(optimizer, 160, monitor, batch_size=batch)
        looks = [look for look in monitor.history if "stability" in look]
        left.plot([look["step"] for look in looks], [look["stability"] for look in looks], marker="o", ms=3, label=name)
        last[name] = looks[-1]["stability"]
    left.axhline(1, color="gray", linestyle="--")
    left.set_xlabel("optimizer step")
    left.set_ylabel("largest eigenvalue / largest stable one")
    left.legend()
    dense = CurvatureMonitor(every_n_steps=160, steps=60, probes=2)
    run(SGD, 160, dense)
    assert dense.spectrum is not None
    curve = smoothed(dense.spectrum.runs, 0)
    right.fill_between(curve.grid.tolist(), curve.density.clamp_min(1e-6).tolist(), 1e-6, alpha=0.6)
    right.set_yscale("log")
    right.set_xlabel("eigenvalue after 160 steps of SGD with momentum")
    right.set_ylabel("density")
    save_figure(figure, ROOT / "docs/pictures/curvature_monitor.png")
    return last


def geometry_picture() -> list[tuple[float, float]]:
    """R_med of Adam beside SGD; returns the ratios at equal loss."""
    histories = {}
    for name, optimizer in (("AdamW", ADAMW), ("SGD with momentum", SGD)):
        geometry = LocalGeometry(every_n_steps=40, probes=60)
        run(optimizer, 240, geometry)
        histories[name] = geometry.history
    save_figure(trajectories(histories), ROOT / "docs/pictures/local_geometry.png")
    return ratio_at_equal_loss(histories["SGD with momentum"], histories["AdamW"])


def schedule_picture() -> dict[str, float]:
    """The rates that are set from a bad start, and the validation loss beside those of fixed rates."""
    start = {**SGD, "lr": 1e-4}
    schedule, losses = CurvatureSchedule(every_n_steps=20), Losses()
    run(start, 240, schedule, losses)
    found = {"with the schedule, from lr 1e-4": losses.found}
    for lr in (1e-4, SGD["lr"]):
        fixed = Losses()
        run({**SGD, "lr": lr}, 240, fixed)
        found[f"lr {lr:g}, momentum 0.9"] = fixed.found
    figure, (left, right) = new_figure(1, 2, 10, 4)
    for key in ("lr", "momentum"):
        left.step([x["step"] for x in schedule.history], [x[key] for x in schedule.history], where="post", label=key)
    left.set_yscale("log")
    for name, values in found.items():
        right.plot(*zip(*values, strict=True), label=name)
    right.set_yscale("log")
    right.set_ylabel("validation loss")
    for axis in (left, right):
        axis.set_xlabel("optimizer step")
        axis.legend()
    save_figure(figure, ROOT / "docs/pictures/curvature_schedule.png")
    return {name: values[-1][1] for name, values in found.items()}


def costs(language: bool = False) -> dict[str, dict[str, float]]:
    """What a look of each callback costs with its default options."""
    looks: dict[str, tuple[dict[str, Any], LookingCallback]] = {
        "CurvatureMonitor, SGD": (SGD, CurvatureMonitor(every_n_steps=10)),
        "CurvatureMonitor, AdamW": (ADAMW, CurvatureMonitor(every_n_steps=10)),
        "CurvatureSchedule": (SGD, CurvatureSchedule(every_n_steps=10)),
        "LocalGeometry": (SGD, LocalGeometry(every_n_steps=10)),
    }
    return {name: cost(optimizer, looking, language) for name, (optimizer, looking) in looks.items()}


PARTS: dict[str, Callable[[], Any]] = {
    "cost": costs,
    "cost_on_language": functools.partial(costs, language=True),
    "stability": monitor_picture,
    "ratios_of_r_med_at_equal_loss": geometry_picture,
    "validation_loss": schedule_picture,
}


def main() -> None:
    torch.set_num_threads(1)
    path = ROOT / "benchmarks/results/looks.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:] or list(PARTS):
        result[name] = PARTS[name]()
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
