"""Fine-tuning: a network that has learned handwritten digits in a mirror learns to read them from fifty images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import ConfiguredOptimizer, OptimizerSpec, create_optimizer
from lightning_optim.errors import needed


def digits(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Some of 1797 images, whose order is one of chance and always the same, and the digits that they show."""
    pixels, labels = needed("sklearn.datasets", "This example").load_digits(return_X_y=True)
    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[first:last]
    return torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[some], torch.tensor(labels)[some]


class Block(nn.Sequential):
    """A convolution, its norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        super().__init__(conv, nn.GroupNorm(4, outputs), nn.ReLU())


def network(width: int) -> nn.Sequential:
    """A body of four blocks, and a head for ten digits."""
    blocks = [Block(1, width, 1), Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 2)]
    body = nn.Sequential(*blocks)
    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 2 * 2, 10))
    return nn.Sequential(body, head)


def pretrain(path: Path, width: int) -> None:
    """Train on the mirror images of 897 digits, and save the weights."""
    torch.manual_seed(0)
    images, labels = digits(900, 1797)
    images = images.flip(3)
    net = network(width)
    optimizer = create_optimizer("adamw", net)
    for _ in range(8):
        for batch in torch.split(torch.randperm(len(labels)), 32):
            optimizer.zero_grad()
            loss: Any = cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)


class Finetuned(ConfiguredOptimizer, LightningModule):
    """A classifier whose body begins as that of a checkpoint, and whose head begins anew.

    Args:
        optimizer: A word, or a mapping with `name` and options.
        pretrained: The checkpoint; it is made where it is missing. None: begin anew altogether.
        width: Channels of the first blocks.
    """

    def __init__(
        self,
        optimizer: OptimizerSpec = "adamw",
        pretrained: str | None = "logs/finetune/pretrained.pt",
        width: int = 32,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = network(width)
        self.pretrained, self.width = pretrained, width

    def prepare_data(self) -> None:
        """Lightning calls this in one process of a machine, before all others go on: the place for a download."""
        if self.pretrained is not None and not Path(self.pretrained).exists():
            pretrain(Path(self.pretrained), self.width)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.pretrained is not None:
            saved = torch.load(self.pretrained, weights_only=True)
            self.body.load_state_dict({name[2:]: value for name, value in saved.items() if name.startswith("0.")})

    def configure_model(self) -> None:
        """Under FSDP2: shard each block by itself, and then the rest, once."""
        if self.device_mesh is not None and not isinstance(self.head, FSDPModule):
            for part in (*self.body.children(), self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: list[Tensor]) -> None:
        right = self.head(self.body(batch[0])).argmax(1) == batch[1]
        self.log(f"{stage}/accuracy", right.float().mean(), prog_bar=True, batch_size=len(right), sync_dist=True)


class FewDigits(LightningDataModule):
    """50 images for training, 100 for validation and 600 for the test.

    Args:
        batch_size: Images in a batch, of each process.
    """

    def __init__(self, batch_size: int = 10) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.train, self.val, self.test = (TensorDataset(*digits(*ends)) for ends in ((0, 50), (200, 300), (300, 900)))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, 200)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, 200)
