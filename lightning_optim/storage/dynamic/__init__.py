"""Dynamic tree quantization.  Dettmers, Lewis, Shleifer & Zettlemoyer 2021, arXiv:2110.02861.

The scale of a block is its value of largest magnitude, with its sign, so that this value is always dequantized to
itself. With an unsigned scale a negative value of largest magnitude would shrink by 0.7 % whenever it is stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage.format import Codebook, Format

CELLS, NEAREST_CELL = 2945, 13312  # as in cpp.h


@functools.lru_cache
def values(signed: bool, device: torch.device) -> Tensor:
    """The codebook: 256 values in [-1, 1] or in [0, 1], ascending, float32."""
    entries = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float32, device="cpu")
        positive = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        entries += positive + ([-value for value in positive] if signed else [])
    return torch.tensor(sorted(entries), dtype=torch.float32, device=device)


def first_of_each_code(signed: bool) -> Tensor:
    """The smallest float32 of each of the codes 1, 2, ... 255, found by bisection between neighbouring entries."""
    table = values(signed, torch.device("cpu"))
    lower, upper = table[:-1], table[1:]
    low, high = lower.double(), upper.double()
    for _ in range(64):
        middle = ((low + high) / 2).float()
        up = ~(middle - lower < upper - middle)
        low, high = torch.where(up, low, middle.double()), torch.where(up, middle.double(), high)
    return high.float()


@functools.cache
def searchable(signed: bool) -> Tensor:
    """The codebook, followed by a table that finds codes without a search.

    Numbers with the same exponent and the same seven leading bits of the mantissa form a cell. A cell is so narrow that
    at most one code begins in it. The table has cells from 2^-23 to 1, and then those of negative numbers. Smaller
    numbers belong to the first cell, the one of zero.

    Returns:
        The 256 values; for each cell the number of codes that begin below it, as the bits of an int32; and for each
        cell the smallest number of the next code. All of it is one flat float32 tensor.
    """
    begins = first_of_each_code(signed)
    edges = ((torch.arange(CELLS + 1, dtype=torch.int32, device="cpu") + NEAREST_CELL) << 16).view(torch.float32)
    edges[0] = 0.0
    low = torch.cat([edges[:-1], -edges[1:].nextafter(torch.zeros_like(edges[1:]))])  # the smallest number of each cell
    below = torch.searchsorted(begins, low, right=True)
    following = torch.cat([begins, begins.new_full((1,), torch.inf)])[below]
    return torch.cat([values(signed, torch.device("cpu")), below.int().view(torch.float32), following])


SIGNED = Codebook("signed_codebook", functools.partial(values, True), functools.partial(searchable, True))
UNSIGNED = Codebook("unsigned_codebook", functools.partial(values, False), functools.partial(searchable, False))


@dataclass(frozen=True)
class Dynamic(Format):
    """Each value is an entry of a fixed codebook times the value of largest magnitude in its block.

    A value is rounded to the nearest entry, except that with the unsigned codebook a positive value never becomes zero.

    Attributes:
        signed: Whether values may be negative.
    """

    name: ClassVar[str] = "dynamic"
    signed: bool

    @property
    def codebook(self) -> Codebook:
        return SIGNED if self.signed else UNSIGNED

    @property
    def constants(self) -> tuple[bool]:
        return (self.signed,)

    def quantize(self, x: Tensor, partner: Tensor | None, dither: Tensor | None) -> tuple[Tensor, Tensor]:
        table = values(self.signed, x.device)
        largest = x.abs().argmax(1, keepdim=True)
        scale = x.gather(1, largest)
        z = torch.where(scale != 0, x / scale, 0.0)
        above = torch.bucketize(z, table).clamp(1, 255)
        codes = above - (z - table[above - 1] < table[above] - z).to(above.dtype)
        if not self.signed:
            codes = torch.where((x > 0) & (codes == 0), 1, codes)
        return codes.to(torch.uint8), scale

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        return values(self.signed, codes.device)[codes.to(torch.int64)] * scales
