"""Training sharded over two CPU ranks equals replicated training and resumes exactly: FSDP1 and FSDP2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from tests.harness.cpu_fsdp import CPUFSDP
from tests.harness.ranks import run_ranks

Kind = Literal["ddp", "fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded"]
SHARDED: list[Kind] = ["fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded"]


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(round(loss.item(), 5))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class FullySharded(Regression):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=mesh)


def build(kind: Kind) -> tuple[Regression, Strategy]:
    full: Any = kind.split()[-1]
    if kind == "ddp":
        return Regression(), DDPStrategy()
    if kind.startswith("fsdp1"):
        return Regression(), CPUFSDP(state_dict_type=full, auto_wrap_policy={nn.Linear})
    size = int(os.environ["WORLD_SIZE"])
    return FullySharded(), ModelParallelStrategy(size, 1, save_distributed_checkpoint=full == "sharded")


def fit(kind: Kind, folder: Path, resume: Path | None = None) -> list[float]:
    """Two epochs of four steps, with a checkpoint after the first; the losses of this rank."""
    model, strategy = build(kind)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_epochs=2,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x[:, :1] * 2), batch_size=8), ckpt_path=resume)
    return model.losses


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_training_equals_replicated_and_resumes(kind: Kind, tmp_path: Path) -> None:
    losses = run_ranks(fit, kind, tmp_path / "first")
    assert losses == run_ranks(fit, "ddp", tmp_path / "ddp")
    resumed = run_ranks(fit, kind, tmp_path / "second", resume=tmp_path / "first" / "step=4.ckpt")
    assert resumed == [mine[4:] for mine in losses]
