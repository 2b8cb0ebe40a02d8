"""A run that goes on with another optimizer than its checkpoint's: the options of the new one, under a schedule too."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler

from lightning_optim.callbacks import WarmupFreeSchedule
from tests.harness.data import batches
from tests.harness.modules import Configured
from tests.harness.nets import plain_net
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer

STEPS, SAVED = 8, 4

pytestmark = pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable", "ignore:.*another class")


class Rates(Callback):
    """Notes the rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.seen += {float(group["lr"]) for group in optimizer.param_groups}


class UnderTorch(Configured):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rates(kind: Kind, module: Configured, folder: Path, resume: bool = False, warm: bool = False) -> list[float]:
    """The rates of a fit that saves after its fourth step, or goes on from there."""
    seen = Rates()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_on_train_epoch_end=False, save_top_k=-1)
    callbacks = [seen, saving, *([WarmupFreeSchedule("linear", beta2=0.6)] if warm else [])]
    fitting = trainer(*callbacks, strategy=strategy_of(kind), max_steps=STEPS)
    fitting.fit(module, batches(), ckpt_path=folder / f"step={SAVED}.ckpt" if resume else None)
    return seen.seen


def changed(kind: Kind, schedule: Any, warm: bool, folder: Path) -> tuple[list[float], list[float]]:
    """The rates of AdamW, and those of Lion with a tenth of its rate, from AdamW's checkpoint on."""
    first = rates(kind, Configured({"name": "adamw", "lr": 1e-2, "schedule": schedule}), folder, warm=warm)
    second = Configured({"name": "lion", "lr": 1e-3, "schedule": schedule})
    with pytest.warns(UserWarning, match="Lion loads a checkpoint of AdamW, which is another class"):
        return first, rates(kind, second, folder, resume=True, warm=warm)


@pytest.mark.parametrize(
    ("kind", "schedule", "warm"),
    [
        *product(["single"], [None, "cosine", {"name": "linear", "warmup_steps": 3}], [False, True]),
        ("fsdp2 full", "cosine", True),
    ],
)
def test_the_rate_is_that_of_the_new_class(kind: Kind, schedule: Any, warm: bool, tmp_path: Path) -> None:
    if kind == "single":
        first, second = changed(kind, schedule, warm, tmp_path)
    else:
        first, second = run_ranks(changed, kind, schedule, warm, tmp_path)[0]
    assert second == pytest.approx([rate / 10 for rate in first[SAVED:]])


def test_a_scheduler_of_torch_brings_the_old_rate_back_and_the_message_says_so(tmp_path: Path) -> None:
    rates("single", UnderTorch({"name": "adamw", "lr": 1e-2}, plain_net), tmp_path)
    with pytest.warns(UserWarning, match="scheduler of torch.optim"):
        rates("single", UnderTorch({"name": "lion", "lr": 1e-3}, plain_net), tmp_path, resume=True)


def test_a_schedule_goes_on_from_a_scheduler_of_torch(tmp_path: Path) -> None:
    first = rates("single", UnderTorch({"name": "adamw", "lr": 1e-2}), tmp_path)
    scheduled = Configured({"name": "adamw", "lr": 1.0, "schedule": "cosine"})
    assert rates("single", scheduled, tmp_path, resume=True) == pytest.approx(first[SAVED:])
