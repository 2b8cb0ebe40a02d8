"""The small models of the experiments: perceptron, convolutional net, transformer and LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.claims.data import TOKENS
from lightning_optim.nn import TransformerBlock

CLASSES = 10


def perceptron(width: int, depth: int = 2, inputs: int = 64, norm: bool = False) -> nn.Sequential:
    """`depth` hidden layers with ReLU, on images or vectors; with `norm` batch normalization before each ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers.append(nn.Linear(width if i else inputs, width))
        layers += [nn.BatchNorm1d(width), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width if depth else inputs, CLASSES))


def convolutional(width: int, norm: bool = False) -> nn.Sequential:
    """Two convolutions with pooling, and a linear layer, on images of (1, 8, 8)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, 2 * width)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)] if norm else [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, CLASSES))


class Transformer(nn.Module):
    """A language model: maps tokens of shape (batch, length) to logits of shape (batch, length, TOKENS).

    Args:
        norm: Where the layer norms stand, "pre" or "post".
        depth: Number of blocks.
        width: Size of a token's vector, a multiple of `heads`.
        heads: Number of attention heads.
        length: The most tokens.
    """

    def __init__(
        self, norm: Literal["pre", "post"] = "pre", depth: int = 2, width: int = 32, heads: int = 2, length: int = 64
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, norm, causal=True) for _ in range(depth)))
        self.last_norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(width, TOKENS)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions.weight[: text.shape[1]]
        logits: Tensor = self.head(self.last_norm(self.blocks(x)))
        return logits


class Recurrent(nn.Module):
    """A language model of LSTM layers, with the shapes of `Transformer`."""

    def __init__(self, width: int = 64, depth: int = 1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.layers = nn.LSTM(width, width, depth, batch_first=True)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.tokens(text))[0])
        return logits


PROCESS = 400e6  # bytes of a process before it has a model


def memory(build: Callable[[], nn.Module], activations: float = 0.0, slots: int = 3) -> float:
    """About the bytes of a training run.

    Args:
        build: Makes the model; it is made without storage.
        activations: Numbers that a batch leaves for the backward pass.
        slots: State of the optimizer, in numbers per parameter.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in build().parameters())
    return PROCESS + 4 * (count * (2 + slots) + activations)
