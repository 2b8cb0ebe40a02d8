"""The networks that tests train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 13  # no number of ranks here divides it


def plain_net() -> nn.Sequential:
    """Four inputs, two outputs; its first weights are those of the seed of the run."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def frozen_net() -> nn.Sequential:
    return plain_net().requires_grad_(False)


def seeded_net() -> nn.Sequential:
    """Eight inputs, one output; the same first weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


class Wide(nn.Linear):
    """A layer that is sharded by itself; the rest of the model, the tied weight included, is one unit."""


class Odd(nn.Module):
    """Sizes that do not divide, a frozen weight, a tied weight, a branch without gradients, shards without elements."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward = Wide(5, WIDTH)
        self.large = Wide(WIDTH, 332)  # 4316 elements: kept in 8 bits where asked for
        self.back = Wide(332, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.square = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.square.weight
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.unused = Wide(3, 2)
        self.out = Wide(WIDTH, 1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.inward(x)))
        x = x + self.back(torch.relu(self.large(x))) + self.frozen(x)
        return self.out(torch.tanh(self.tied(torch.relu(self.square(x)))))  # type: ignore[no-any-return]


def odd_net() -> Odd:
    return Odd(torch.float32)
