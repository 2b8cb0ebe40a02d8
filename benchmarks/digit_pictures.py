"""Draws what GradientNoiseScale and StationarityMonitor see on the digits: `python -m benchmarks.digit_pictures`.

Runs the digits example twice, and writes `docs/pictures/gradient_noise_scale.png` and `docs/pictures/stationarity.png`.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from benchmarks.pages import ROOT
from benchmarks.pictures import new_figure, save_figure
from examples.digits.digits import DigitsClassifier, DigitsData
from lightning_optim import OptimizerSpec
from lightning_optim.callbacks import GradientNoiseScale, StationarityMonitor

PICTURES = ROOT / "docs" / "pictures"


class Softmax(DigitsClassifier):
    """Softmax regression, whose loss with weight decay has one minimum."""

    def __init__(self, optimizer: OptimizerSpec) -> None:
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Record(Callback):
    """The noise scale after each measurement, and the training loss."""

    def __init__(self, of: GradientNoiseScale | None = None) -> None:
        self.of = of
        self.scales: list[tuple[int, float, float]] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.of is not None and self.of.running[0].count > len(self.scales):
            found = self.of.running[0].value
            self.scales.append((trainer.global_step, found.estimate, found.standard_error))


def fit(module: DigitsClassifier, epochs: int, batch_size: int, *callbacks: Callback) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=DigitsData(batch_size))


def draw_noise_scale() -> None:
    """Batches of 64, of which each is seen in two halves."""
    callback = GradientNoiseScale(every=1, decay=0.95)
    record = Record(callback)
    seed_everything(0, verbose=False)
    fit(DigitsClassifier({"name": "sgd", "lr": 0.03}), 30, 64, callback, record)
    figure, (axes,) = new_figure(1, 1, 7, 3.2)
    steps, scales, errors = (list(column) for column in zip(*record.scales[5:], strict=True))
    low = [max(scale - 2 * error, 1) for scale, error in zip(scales, errors, strict=True)]
    high = [scale + 2 * error for scale, error in zip(scales, errors, strict=True)]
    axes.fill_between(steps, low, high, alpha=0.25, label="± 2 standard errors")
    axes.plot(steps, scales, label="critical batch size")
    axes.axhline(64, color="black", linestyle="--", label="batch size of the run")
    axes.set(yscale="log", xlabel="step", ylabel="samples", title="Digits, SGD: gradient noise scale", ylim=(5, 3e3))
    axes.legend()
    save_figure(figure, PICTURES / "gradient_noise_scale.png")


def draw_stationarity() -> None:
    """A constant learning rate whose noise keeps the weights moving, with weight decay to keep them in place."""
    monitor, record = StationarityMonitor(window=400, every=1, batches=20), Record()
    seed_everything(0, verbose=False)
    fit(Softmax({"name": "sgd", "lr": 0.5, "weight_decay": 0.05}), 400, 64, monitor, record)
    figure, (loss, movement, gradient) = new_figure(3, 1, 7, 6.5)
    means = torch.tensor(record.losses).unfold(0, 50, 50).mean(1)
    loss.plot([50 * i + 25 for i in range(len(means))], means.tolist())
    loss.set(yscale="log", ylabel="training loss", title="Softmax regression on the digits, constant learning rate")
    steps = [step for step, _ in monitor.history]
    movement.plot(steps, [found.level for _, found in monitor.history], label="length of a step / first window")
    movement.set(yscale="log", ylabel="relative length")
    movement.legend()
    measured = [(step, found.gradient) for step, found in monitor.history if found.gradient is not None]
    at = [step for step, _ in measured]
    gradient.plot(at, [one.plug_in for _, one in measured], label="with the noise of 20 batches")
    gradient.errorbar(
        at, [one.square for _, one in measured], [2 * one.error for _, one in measured], label="without", capsize=2
    )
    gradient.set(yscale="log", xlabel="step", ylabel="|G|²")
    gradient.legend()
    colours = {"still moving": "tab:orange", "invariant measure reached": "tab:green", "undecided": "tab:gray"}
    for axes in (loss, movement, gradient):
        axes.set(xlim=(0, 8000))
        for step, found in monitor.history:
            axes.axvspan(step - 400, step, color=colours.get(found.verdict, "tab:blue"), alpha=0.15, linewidth=0)
    save_figure(figure, PICTURES / "stationarity.png")
    for step, found in monitor.history:
        print(step, found)


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    PICTURES.mkdir(exist_ok=True)
    draw_noise_scale()
    draw_stationarity()


if __name__ == "__main__":
    main()
