"""Learning rates: what is applied, what would be by hand, and whoever else sets them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import lr_scheduler

import lightning_optim
from tests.harness.data import BATCHES, batches
from tests.harness.modules import Make, Toy, vector

LR = 0.05


def adan(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return lightning_optim.Adan(params, lr=LR, betas=(0.9, 0.8, 0.7))


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.7))


def rmsprop(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=LR, alpha=0.7)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9)


def warm(rule: str, t: int, b: float) -> float:
    """The factor of step t = 1, 2, ..., written from the papers' formulas."""
    if rule == "none":
        return 1.0
    if rule == "linear":
        return min(1.0, 0.5 * (1 - b) * t)
    if rule == "exponential":
        return float(1 - np.exp(-(1 - b) * t))

    def rho(s: int) -> float:
        return 2 / (1 - b) - 1 - 2 * s * b**s / (1 - b**s)

    first = next(s for s in range(1, 100) if rho(s) > 4)
    x, top = rho(t + first - 1), 2 / (1 - b) - 1
    return math.sqrt((x - 4) * (x - 2) * top / ((top - 4) * (top - 2) * x))


def fall(decay: str, t: int, total: int, e: float = 0.0) -> float:
    """The factor after t steps."""
    u = t / total
    return {
        "constant": 1.0,
        "cosine": e + (1 - e) * 0.5 * (1 + math.cos(math.pi * u)),
        "linear": 1 - (1 - e) * u,
        "inverse_sqrt": max(e, math.sqrt(0.01 * total / (t + 0.01 * total))),
        "flat_linear": 1.0 if u < 0.8 else 1 - (1 - e) * (u - 0.8) / 0.2,
    }[decay]


def rates(rule: str, decay: str, steps: int, total: int, b: float = 0.7, e: float = 0.0) -> list[float]:
    return [LR * warm(rule, t + 1, b) * fall(decay, t, total, e) for t in range(steps)]


class Applied(Callback):
    """The learning rate of each group of each optimizer at the moment of each of its steps."""

    def __init__(self) -> None:
        self.rates: dict[int, list[list[float]]] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found = self.rates.setdefault(trainer.optimizers.index(optimizer), [])
        found.append([float(group["lr"]) for group in optimizer.param_groups])

    @property
    def first(self) -> list[float]:
        """Those of the first group of the first optimizer."""
        return [found[0] for found in self.rates[0]]


def plain_loop(make: Make, lrs: list[float]) -> Tensor:
    """The weights after steps at these learning rates, in float64."""
    seed_everything(0, verbose=False)
    module = Toy(make).double()
    optimizer = make(list(module.parameters()))
    data = list(batches())
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        torch.autograd.backward(module.loss([part.double() for part in data[step % BATCHES]]))
        optimizer.step()
    return vector(module)


def stepped(make: Callable[[Any], Any], **config: Any) -> type[Toy]:
    """A module that returns a scheduler."""

    class Scheduled(Toy):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", 1.0)  # never better: a plateau

        def configure_optimizers(self) -> Any:
            optimizer = self.make(list(self.parameters()))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

    return Scheduled


SCHEDULED = {
    "lambda": stepped(lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t), interval="step"),
    "step": stepped(lambda o: lr_scheduler.StepLR(o, 3, 0.5), interval="step"),
    "epochs": stepped(lambda o: lr_scheduler.ExponentialLR(o, 0.5)),
    "cosine": stepped(lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.01), interval="step"),
    "one cycle": stepped(lambda o: lr_scheduler.OneCycleLR(o, 0.2, 12), interval="step"),
    "sequence": stepped(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
        interval="step",
    ),
    "chain": stepped(
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 5), lr_scheduler.ExponentialLR(o, 0.9)]),
        interval="step",
    ),
    "plateau": stepped(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0), monitor="loss"),
}


class Meddler(Callback):
    """Sets a learning rate by itself."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.5


def logged(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def stored(values: list[float]) -> dict[int, float]:
    """What TensorBoard keeps of numbers, one for each step."""
    return {step: float(np.float32(value)) for step, value in enumerate(values)}


class Rest:
    """A loader that goes on where a run of some steps left it."""

    def __init__(self, done: int) -> None:
        self.done, self.skip = done, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        found, self.skip = list(batches())[self.skip :], 0
        return iter(found)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = self.done % BATCHES


class Manual(Toy):
    """Two optimizers; the first steps twice in every batch, the second in every other one, with a scheduler."""

    def __init__(self) -> None:
        super().__init__(adan)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> Any:
        first, second = self.optimizers()  # type: ignore[attr-defined]
        for optimizer in [first, first, second] if index % 2 == 0 else [first, first]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            if optimizer is second:
                self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        first = lightning_optim.Adan(self.net[0].parameters(), lr=LR, betas=(0.9, 0.8, 0.7))  # type: ignore[index]
        second = torch.optim.Adam(self.net[2].parameters(), lr=LR, betas=(0.9, 0.9))  # type: ignore[index]
        return [first, second], [lr_scheduler.ExponentialLR(second, 0.5)]


class Note(Callback):
    kept: list[float] = []  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.kept.append(optimizer.param_groups[0]["lr"])
