"""Every callback of the package, and a module that notes what a fit did to it and may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim.callbacks
from lightning_optim import SGDW, AdamW, ScheduleFreeAdamW
from tests.harness.data import batches
from tests.harness.modules import Toy, vector
from tests.harness.trainers import trainer

# What a constructor needs, or takes so that it acts within a few steps.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "BatchSizeScaling": [{"reference_batch": 4}],
    "Communication": [{"kind": "bf16"}],
    "GradInit": [{"gamma": 10.0, "iterations": 1, "table": False}],
    "GradientNoise": [{}, {"kind": "moments"}],
    "GradientNormProfile": [{"blocks": "Linear", "every": 2, "batches": 2, "table": False}],
    "IterateAveraging": [
        {"start": 0},
        {"kind": "ema", "decay": 0.8},
        {"kind": "mean", "start": 0, "evaluate_raw": True},
    ],
    "LookaheadSync": [{"k": 3}, {"k": 3, "evaluate": "slow"}, {"k": 3, "momentum": "pullback"}],
    "OptimizerStateMemory": [{"table": False}],
    "WarmupFreeSchedule": [{"beta2": 0.5}],
}
# What one says, once in a fit, with an optimizer that gives it nothing to do.
SAYS = {"EvaluationWeights": "EvaluationWeights has nothing to do"}
Make = Callable[[], Callback]


def makers() -> Iterator[Any]:
    for name in lightning_optim.callbacks.__all__:
        for options in ARGUMENTS.get(name, [{}]):
            words = "-".join(str(value) for key, value in options.items() if isinstance(value, str))

            def make(name: str = name, options: dict[str, Any] = options) -> Callback:
                made: Callback = getattr(lightning_optim.callbacks, name)(**options)
                return made

            yield pytest.param(make, id=f"{name}-{words}" if words else name)


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02)


def in_codes(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.02, state_bits=8)


def in_floats(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.02)


def averaging(params: Any) -> torch.optim.Optimizer:
    return ScheduleFreeAdamW(params, lr=0.02)


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def momentum_in_codes(params: Any) -> torch.optim.Optimizer:
    return SGDW(params, lr=0.02, momentum=0.9, state_bits=8)


# Those with which callbacks act that have nothing to do with the others.
ACTS_WITH = {"EvaluationWeights": averaging}
# Those of callbacks that refuse the others.
ONLY_WITH = {"CurvatureSchedule": (momentum, momentum_in_codes)}


def pairs() -> Iterator[Any]:
    """Every callback with every optimizer for which it is there, or to which it says that it does nothing."""
    for made in makers():
        name = made.id.split("-")[0]
        says = [pytest.mark.filterwarnings(f"ignore:{SAYS[name]}")] if name in SAYS else []
        first, *others = ONLY_WITH.get(name, (torchs, in_codes, in_floats))
        for optimizer in (first, *others):
            marks = says if optimizer is first else [*says, pytest.mark.full]
            yield pytest.param(*made.values, optimizer, marks=marks, id=f"{optimizer.__name__}-{made.id}")
        if name in ACTS_WITH:
            acts = ACTS_WITH[name]
            yield pytest.param(*made.values, acts, id=f"{acts.__name__}-{made.id}")


every_callback = pytest.mark.parametrize(("make", "optimizer"), list(pairs()))


def net() -> nn.Sequential:
    """Large enough for codes, with batch normalization."""
    return nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


class Module(Toy):
    """Notes the weights of each training batch, of each validation and test batch, and may fail."""

    def __init__(self, optimizer: Any, fails: tuple[str, type[BaseException]] | None = None) -> None:
        seed_everything(0, verbose=False)
        super().__init__(optimizer, net)
        self.lr, self.batch_size, self.fails = 0.02, 8, fails
        self.trained: list[Tensor] = []

    def train_dataloader(self) -> DataLoader[Any]:
        return batches(batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return batches(batch_size=16)

    test_dataloader = predict_dataloader = val_dataloader

    def fail_in(self, hook: str) -> None:
        if self.fails is not None and self.fails[0] == hook and self.global_step >= 6:
            raise self.fails[1]()

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        self.trained.append(vector(self))
        self.fail_in("training_step")
        return super().training_step(batch, index)

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        self.log("val", self.loss(batch))
        self.fail_in("validation_step")

    def on_train_epoch_end(self) -> None:
        self.fail_in("on_train_epoch_end")

    def teardown(self, stage: str) -> None:
        self.fail_in("teardown")

    def predict_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        return vector(self)


def fit(
    optimizer: Any, *callbacks: Callback, ckpt_path: Path | None = None, kind: type[Module] = Module, **options: Any
) -> tuple[Trainer, Module]:
    module = kind(optimizer)
    fitting = trainer(*callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 1, **options})
    fitting.fit(module, ckpt_path=ckpt_path)
    return fitting, module
