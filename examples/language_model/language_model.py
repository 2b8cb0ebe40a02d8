"""A small language model of bytes, and the source text of Python's standard library, which is on every machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

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
        batch_size: Windows in a batch.
        batches: Batches in an epoch.
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
        generator = torch.Generator().manual_seed(self.seed)
        order = RandomSampler(self.train, num_samples=self.batches * self.batch_size, generator=generator)
        return DataLoader(self.train, self.batch_size, sampler=order)

    def val_dataloader(self) -> DataLoader[Any]:
        some = torch.arange(0, len(self.val), max(1, len(self.val) // 256)).tolist()
        return DataLoader(torch.utils.data.Subset(self.val, some), 64)
