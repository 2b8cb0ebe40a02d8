"""A small language model of bytes, and the source text of Python's standard library, which is on every machine."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_optim import ConfiguredOptimizer, OptimizerSpec
from lightning_optim.nn import TransformerBlock

BYTES = 256


class LanguageModel(ConfiguredOptimizer, LightningModule):
    """A transformer that predicts the next byte.

    Args:
        norm: Where the layer norms of a block stand: "pre" or "post".
        depth: Number of blocks.
        width: Size of a token's vector.
        heads: Number of attention heads.
        length: The most tokens that it sees.
        optimizer: A word, or a mapping with `name` and options.
    """

    def __init__(
        self,
        norm: str = "pre",
        depth: int = 6,
        width: int = 64,
        heads: int = 4,
        length: int = 64,
        optimizer: OptimizerSpec = "adamw",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokens = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(length, width)
        # A word that is neither gets its sentence from the block; a Literal here would get that of the parser.
        blocks = (TransformerBlock(width, heads, norm, causal=True) for _ in range(depth))  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(blocks)
        self.last_norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(width, BYTES)

    def configure_model(self) -> None:
        """Under FSDP2: shard each block by itself, and then the rest. Lightning calls it before fit and before test."""
        if self.device_mesh is None or isinstance(self.blocks[0], FSDPModule):
            return
        for block in self.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.last_norm(x))
        return logits

    def loss(self, batch: list[Tensor]) -> Tensor:
        """The mean cross-entropy of a byte, in nats."""
        text = batch[0].long()
        return cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True, sync_dist=True)


class SourceText(LightningDataModule):
    """Windows of the modules of Python's standard library; every 20th module is for validation.

    Args:
        length: Bytes of a window that are predicted.
        batch_size: Windows in a batch, of each process.
        batches: Batches in an epoch, of all processes together.
        seed: Of the order of windows.
    """

    def __init__(self, length: int = 64, batch_size: int = 16, batches: int = 300, seed: int = 0) -> None:
        super().__init__()
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed

    def setup(self, stage: str) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [file.read_bytes() for file in files]
        self.val = self._windows(b"".join(texts[::20]))
        self.train = self._windows(b"".join(text for i, text in enumerate(texts) if i % 20))

    def _windows(self, text: bytes) -> TensorDataset:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return TensorDataset(tokens.unfold(0, self.length + 1, self.length))

    def train_dataloader(self) -> DataLoader[Any]:
        some = SomeWindows(len(self.train), self.batches * self.batch_size, self.seed)
        return DataLoader(self.train, self.batch_size, sampler=some)

    def val_dataloader(self) -> DataLoader[Any]:
        some = torch.arange(0, len(self.val), max(1, len(self.val) // 256)).tolist()
        return DataLoader(torch.utils.data.Subset(self.val, some), 64)


class SomeWindows(Sampler[int]):
    """Some windows of the text in an order of chance, others in each epoch. Lightning shares them out over processes.

    In place of a `RandomSampler` Lightning puts one over the whole text, whose epochs have thousands of steps.
    """

    def __init__(self, windows: int, count: int, seed: int) -> None:
        self.windows, self.count = windows, min(count, windows)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.windows, generator=self.generator)[: self.count].tolist()
