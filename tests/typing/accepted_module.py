"""A user's LightningModule with the mixin, which type checkers must accept. It runs as well."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_optim import ConfiguredOptimizer, OptimizerSpec
from lightning_optim.callbacks import IterateAveraging


class TwoBatches(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(4, 2)

    def __len__(self) -> int:
        return 2


class Regression(ConfiguredOptimizer, LightningModule):
    def __init__(self, optimizer: OptimizerSpec = "adan") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss


def a_module_trains() -> None:
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[IterateAveraging("ema")],
    )
    batches: DataLoader[Tensor] = DataLoader(TwoBatches(), batch_size=None)
    trainer.fit(Regression({"name": "lamb", "lr": 1e-3}), batches)
