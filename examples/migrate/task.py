"""What stays the same in a migration: the network, its loss, and the data."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.errors import needed


class Task(LightningModule):
    """A perceptron for handwritten digits. Each file beside this one adds an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """1437 images for training and 360 for validation, in an order that is always the same."""
    pixels, labels = needed("sklearn.datasets", "This example").load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order])
    train, val = (torch.utils.data.Subset(data, range(*ends)) for ends in ((0, 1437), (1437, 1797)))
    return DataLoader(train, 64), DataLoader(val, 360)


def fit(kind: type[Task], *callbacks: Callback, epochs: int = 4, **options: Any) -> tuple[Task, Trainer]:
    """Train a module, from the same first weights whichever it is; the module and its Trainer."""
    seed_everything(0, verbose=False)
    module = kind()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit(module, *loaders(), **options)
    return module, trainer
