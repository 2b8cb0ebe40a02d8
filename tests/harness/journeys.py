"""A fit under any strategy with validation, the best checkpoint and a test of it; what each of them saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.harness.cpu_fsdp import CPUFSDP
from tests.harness.toys import batches, trainer

SHARDED_FILES = [pytest.param(kind, marks=pytest.mark.full) for kind in ("fsdp1 sharded", "fsdp2 sharded")]
KINDS = ["ddp", "fsdp1 full", "fsdp2 full", *SHARDED_FILES]


class Outer(LightningModule):
    """A network with a parameter of its own in the outermost unit, which FSDP treats differently, and maybe a norm."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], with_norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(6) if with_norm else nn.Identity()
        self.make = make
        self.net = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 2))
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, -1.0]))
        self.seen: dict[str, list[float]] = {"train": [], "val": [], "test": []}

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs * self.scale)
        return outputs

    def loss(self, batch: Sequence[Tensor], kind: str) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.seen[kind].append(loss.item())
        return loss

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.log("val", self.loss(batch, "val"), sync_dist=True)

    def test_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.loss(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(list(self.parameters()))


class OuterSharded(Outer):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        for part in (self.net[0], self.net[3], self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def journey(
    kind: str,
    make: Callable[[Any], torch.optim.Optimizer],
    callback: Callable[[], Callback],
    folder: Path,
    with_norm: bool = False,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Every rank sees the same samples, so every strategy must do what one process does."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    module = (OuterSharded if kind.startswith("fsdp2") else Outer)(make, with_norm)
    saving = ModelCheckpoint(folder, "{step}", monitor="val", save_top_k=-1, every_n_epochs=1)
    fitting = trainer(callback(), saving, strategy=strategy_of(kind, size), devices=size, max_epochs=3)
    fitting.fit(module, batches(), batches(batch_size=16), ckpt_path=resume)
    scores = {path.split("step=")[-1]: float(score) for path, score in saving.best_k_models.items()}
    best = saving.best_model_path
    fresh = (OuterSharded if kind.startswith("fsdp2") else Outer)(make, with_norm)
    if kind.startswith("fsdp"):  # Lightning does not shard a module again that is sharded
        testing = trainer(strategy=strategy_of(kind, size), devices=size)
        testing.test(fresh, batches(batch_size=16), ckpt_path=best, verbose=False)
        module.seen["test"] = fresh.seen["test"]
    else:
        fitting.test(module, batches(batch_size=16), ckpt_path="best", verbose=False)
    assert saving.best_model_score is not None
    return {**module.seen, "scores": scores, "best": float(saving.best_model_score)}


def strategy_of(kind: str, size: int) -> Any:
    saved: Any = kind.split()[-1]
    if kind.startswith("fsdp1"):
        return CPUFSDP(auto_wrap_policy={nn.Linear}, state_dict_type=saved)
    if kind.startswith("fsdp2"):
        return ModelParallelStrategy(size, 1, save_distributed_checkpoint=saved == "sharded")
    return "ddp" if kind == "ddp" else "auto"
