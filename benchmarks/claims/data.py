"""Real data that comes with what is installed: scikit-learn's digits, and the source text of Python's library."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TOKENS = 128
SPLIT = 0  # the seed by which images are split


@dataclass(frozen=True)
class Split:
    """Inputs and targets of one split."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: str) -> Split:
        return Split(self.x.to(device), self.y.to(device))

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without an end: epochs, each in an order of chance, without the last incomplete batch.

        Args:
            size: Samples in a batch, at most all.
            seed: Of the order.
        """
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(self))
        while True:
            order = torch.randperm(len(self), generator=generator).to(self.x.device)
            for at in range(0, len(self) - size + 1, size):
                some = order[at : at + size]
                yield self.x[some], self.y[some]


@functools.lru_cache
def digits() -> tuple[Split, Split, Split]:
    """1797 images of 8 by 8: 1000 for training, 397 for choosing, 400 for the test; pixels of mean 0 and spread 1.

    Images are of shape (1, 8, 8).
    """
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(targets, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT))
    x, y = x[order], y[order]
    x = (x - x[:1000].mean()) / x[:1000].std()
    return tuple(Split(x[a:b], y[a:b]) for a, b in ((0, 1000), (1000, 1397), (1397, 1797)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Text:
    """Bytes of text, of which windows are read."""

    tokens: Tensor

    def batches(self, size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random windows without an end: tokens of shape (size, length), and those that follow each.

        Args:
            size: Windows in a batch.
            length: Tokens of a window.
            seed: Of where windows begin.
        """
        generator = torch.Generator().manual_seed(seed)
        along = torch.arange(length + 1)
        while True:
            begin = torch.randint(len(self.tokens) - length - 1, (size, 1), generator=generator)
            some = self.tokens[begin + along].long()
            yield some[:, :-1], some[:, 1:]

    def windows(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """`count` windows at even distances, the same at each call; for validation."""
        begin = torch.linspace(0, len(self.tokens) - length - 2, count).long().unsqueeze(1)
        some = self.tokens[begin + torch.arange(length + 1)].long()
        return some[:, :-1], some[:, 1:]


@functools.lru_cache
def source_text() -> tuple[Text, Text, Text]:
    """The modules of Python's standard library: of twenty one is for choosing, one for the test, the rest for training.

    A token is a byte of 7 bits; others are left out.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [bytes(byte for byte in file.read_bytes() if byte < 128) for file in files]
    parts = [b"".join(t for i, t in enumerate(texts) if i % 20 not in (0, 10)), b"".join(texts[::20])]
    parts.append(b"".join(texts[10::20]))
    return tuple(Text(torch.frombuffer(bytearray(part), dtype=torch.uint8)) for part in parts)  # type: ignore[return-value]
