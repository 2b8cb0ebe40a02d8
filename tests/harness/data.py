"""The samples that tests train on."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

BATCHES, BATCH = 4, 8  # batches in an epoch, samples in a batch


def samples(count: int = BATCHES * BATCH) -> TensorDataset:
    """For `plain_net`."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, 4, generator=generator)
    return TensorDataset(inputs, inputs.sin() @ torch.randn(4, 2, generator=generator))


def seeded_samples(count: int = BATCHES * BATCH, scale: float = 2.0, seed: int = 0) -> TensorDataset:
    """For `seeded_net`: it is to find the first of its inputs, scaled."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, scale * x[:, :1])


def batches(**options: Any) -> DataLoader[Any]:
    return DataLoader(samples(), **{"batch_size": BATCH, **options})


class Data(LightningDataModule):
    """The same batches, for the command line."""

    def train_dataloader(self) -> DataLoader[Any]:
        return batches()
