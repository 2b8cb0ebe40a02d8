"""Others that put weights into the model, or read them there, beside a callback of ours that swaps."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

from lightning_optim import Adan
from lightning_optim.callbacks import IterateAveraging, LookaheadSync
from tests.harness.modules import Toy, vector
from tests.harness.trainers import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*Swapping scheduler")


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.05)


def adan(params: Any) -> torch.optim.Optimizer:
    return Adan(params, lr=0.02)


class ByHand(Callback):
    """The usual moving average: put into the model for each validation, by a copy of what was there."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = [p.detach().clone() for p in pl_module.parameters()]
        old = getattr(self, "average", now)
        self.average = [0.9 * a + 0.1 * b for a, b in zip(old, now, strict=True)]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.backup = copy.deepcopy(pl_module.state_dict())
        for p, average in zip(pl_module.parameters(), getattr(self, "average", pl_module.parameters()), strict=True):
            p.data.copy_(average)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.backup)


class AroundEpochs(ByHand):
    """The same in other hooks."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Not here."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Not here."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)


class AtTheEnd(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for p in pl_module.parameters():
            p.data.zero_()


@pytest.mark.parametrize("make", [torchs, adan])
@pytest.mark.parametrize("ours", [lambda: IterateAveraging("ema", 0.8), lambda: LookaheadSync(3, evaluate="slow")])
@pytest.mark.parametrize("theirs", [ByHand, AroundEpochs])
@pytest.mark.parametrize("first", [True, False])
def test_another_average_is_noticed(make: Any, ours: Any, theirs: Any, first: bool) -> None:
    callbacks = [theirs(), ours()] if first else [ours(), theirs()]
    with pytest.warns(UserWarning, match="Something has written the weights"):
        Run(make, *callbacks)


def test_weights_that_are_written_when_training_is_over_are_noticed() -> None:
    with pytest.warns(UserWarning, match="Something has written the weights"):
        Run(adan, IterateAveraging("ema"), AtTheEnd(), limit_val_batches=0)


@pytest.mark.parametrize(
    "theirs", [EMAWeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)]
)
@pytest.mark.parametrize("first", [True, False])
def test_those_of_lightning_are_named_before_training(theirs: Any, first: bool) -> None:
    averaging = IterateAveraging("ema")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Run(torchs, *([theirs(), averaging] if first else [averaging, theirs()]), max_epochs=1)
    names = [
        type(theirs()).__name__ in str(warning.message) and "Keep one" in str(warning.message) for warning in caught
    ]
    assert sum(names) == 1


class Bare(ModelCheckpoint):
    """Writes a bare file of the model beside each checkpoint."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        torch.save(pl_module.state_dict(), Path(str(self.dirpath)) / f"{trainer.global_step}.pt")


class Scored(Toy):
    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.log("val", self.loss(batch))


def test_bare_files_of_a_checkpoint_callback_hold_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saving = Bare(tmp_path, "{step}", monitor="val", save_top_k=-1)
    module = Scored(adan)
    Run(adan, IterateAveraging("ema", 0.8), saving, module=module)
    for i, step in enumerate((4, 8, 12)):
        bare = torch.load(tmp_path / f"{step}.pt", weights_only=True)
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert all(map(torch.equal, bare.values(), saved.values()))
        assert torch.equal(torch.cat([x.reshape(-1) for x in bare.values()]), module.validated[2 * i + 1])


class Reads(Callback):
    """Notes the weights in hooks of validation, as a callback for plots would."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(vector(pl_module))

    on_validation_epoch_end = on_validation_epoch_start = on_validation_end


@pytest.mark.parametrize("first", [True, False])
def test_one_validation_has_one_model(first: bool) -> None:
    reads, averaging = Reads(), IterateAveraging("ema", 0.8)
    run = Run(adan, *([reads, averaging] if first else [averaging, reads]))
    assert all(torch.equal(seen, run.module.validated[2 * (i // 3)]) for i, seen in enumerate(reads.seen))
