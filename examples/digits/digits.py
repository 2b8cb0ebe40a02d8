"""Handwritten digits: 1797 images of 8 x 8 pixels, which come with scikit-learn, and a small network for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_optim import ConfiguredOptimizer, OptimizerSpec
from lightning_optim.errors import needed


class DigitsClassifier(ConfiguredOptimizer, LightningModule):
    """A network of two convolutions; `optimizer` is a word, or a mapping with `name` and options.

    Group normalisation sees one sample at a time, so a batch may be split over any number of processes.
    """

    def __init__(self, optimizer: OptimizerSpec = "adan", width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, 10),
        )
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def configure_model(self) -> None:
        """Under FSDP2: shard the network, once; Lightning calls it before fit and before test."""
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)
        self.log("val/loss", cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/accuracy", self.test_accuracy)


class DigitsData(LightningDataModule):
    """1297 images for training, 200 for validation and 300 for the test, always the same ones.

    Args:
        batch_size: Images in a step, over all processes together.
        seed: Of the order in which an epoch takes the images.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str) -> None:
        train_test_split = needed("sklearn.model_selection", "This example").train_test_split
        pixels, labels = needed("sklearn.datasets", "This example").load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        targets = torch.tensor(labels)
        rest, test = train_test_split(range(len(labels)), test_size=300, random_state=0, stratify=labels)
        train, val = train_test_split(rest, test_size=200, random_state=0, stratify=labels[rest])
        self.train, self.val, self.test = (TensorDataset(images[i], targets[i]) for i in (train, val, test))

    def train_dataloader(self) -> Loader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> Loader:
        return self._loader(self.val)

    def test_dataloader(self) -> Loader:
        return self._loader(self.test)

    def _loader(self, dataset: TensorDataset, shuffle: bool = False) -> Loader:
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        batches = GlobalBatches(len(dataset), self.batch_size, rank, ranks, self.seed if shuffle else None)
        return Loader(dataset, sampler=batches, batch_size=None)


class GlobalBatches(Sampler[list[int]]):
    """Batches that are the same on any number of processes: of each, rank r of n takes every n-th sample.

    With a seed every epoch has its own order, and an incomplete last batch is dropped. It knows how far the
    epoch is then, so a run that resumes in the middle of one goes on with the next batch. Without one each pass
    begins with the first batch.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, ranks: int, seed: int | None) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = self.taken = 0  # `taken` batches of this epoch

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        if epoch != self.epoch:
            self.epoch, self.taken = epoch, 0

    def __len__(self) -> int:
        batches = self.samples / self.batch_size
        return math.ceil(batches) if self.seed is None else math.floor(batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.samples)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.samples, generator=generator)
        first = 0 if self.seed is None else self.taken
        for i in range(first, len(self)):
            self.taken = i + 1
            yield order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.ranks].tolist()
        self.taken = 0


class Loader(DataLoader[Any]):
    """A DataLoader that Lightning saves and resumes, since it has `state_dict` and `load_state_dict`."""

    def state_dict(self) -> dict[str, int]:
        batches = cast(GlobalBatches, self.sampler)
        return {"epoch": batches.epoch, "taken": batches.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        batches = cast(GlobalBatches, self.sampler)
        batches.epoch, batches.taken = state["epoch"], state["taken"]
