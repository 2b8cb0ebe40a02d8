"""The dynamic-tree code.  Dettmers, Lewis, Shleifer & Zettlemoyer 2021, arXiv:2110.02861.

The scale of a block carries the sign of its largest value, which so is always dequantized to itself; with an
unsigned scale a negative maximum would shrink by 0.7 % at every store.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@functools.lru_cache
def codebook(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the code in [-1, 1], or in [0, 1], ascending, float32."""
    entries = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float32)
        values = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        entries += values + ([-value for value in values] if signed else [])
    return torch.tensor(sorted(entries), dtype=torch.float32, device=device)


def first_of_each_code(signed: bool) -> Tensor:
    """The smallest float32 that is kept as code 1, 2, ... 255: where the nearest entry changes, found by halving."""
    table = codebook(signed, torch.device("cpu"))
    lower, upper = table[:-1], table[1:]
    low, high = lower.double(), upper.double()
    for _ in range(64):
        middle = ((low + high) / 2).float()
        up = ~(middle - lower < upper - middle)
        low, high = torch.where(up, low, middle.double()), torch.where(up, middle.double(), high)
    return high.float()


@dataclass(frozen=True)
class Dynamic:
    """Each value is the nearest entry of a fixed table, times the block's largest value.

    In the unsigned table a positive value never becomes zero: it is rounded up to the smallest entry.

    Attributes:
        signed: Whether values may be negative.
    """

    signed: bool
    partner: str | None = None
    name: str = "dynamic"
    scales_per_block: int = 1
    stochastic: bool = False

    def quantize(self, x: Tensor, partner: Tensor | None, random: Tensor | None) -> tuple[Tensor, Tensor]:
        table = codebook(self.signed, x.device)
        largest = x.abs().argmax(1, keepdim=True)
        scale = x.gather(1, largest)
        z = torch.where(scale != 0, x / scale, 0.0)
        above = torch.bucketize(z, table).clamp(1, 255)
        codes = above - (z - table[above - 1] < table[above] - z).to(above.dtype)
        if not self.signed:
            codes = torch.where((x > 0) & (codes == 0), 1, codes)
        return codes.to(torch.uint8), scale

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        return codebook(self.signed, codes.device)[codes.to(torch.int64)] * scales
