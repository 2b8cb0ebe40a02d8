"""Second moments by their logarithm, rounded stochastically.

A second moment moves by a thousandth in a step, far less than one code of eight bits, so nearest rounding freezes it
or lets it climb only. Rounding up with the probability of the remainder is right on average.

The logarithm is the one that a float32 carries: its bits, read as an integer, grow with the logarithm to base 2 and
run straight from one power of two to the next. So between two codes of the same octave the mean of what is kept is the
value itself (between two of different octaves it is up to an eighth of a step too large), no logarithm is computed,
and every engine finds the same codes to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage.format import Format

OCTAVES = 40  # smaller values than the block's largest by more than this are kept at that
LEVELS = 254.0  # steps between code 1, the smallest positive value, and code 255, the largest
FINEST = 2048.0  # a step is at least so many units in the last place: dequantized values are on levels for certain
SNAP = 2.0**-10  # as near to a level as this is on it: dequantized values go back to their codes


@dataclass(frozen=True)
class Log(Format):
    """Code 0 is zero; codes 1 to 255 divide the logarithm between the block's smallest and largest value evenly.

    The scales are these two as they are, so that they dequantize exactly and a dequantized block quantizes to itself. A
    positive value never becomes zero.
    """

    name: ClassVar[str] = "log"
    scales_per_block: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    def quantize(self, x: Tensor, partner: Tensor | None, random: Tensor | None) -> tuple[Tensor, Tensor]:
        assert random is not None
        bits = x.view(torch.int32).clamp_min(0)  # 0 for what is not positive
        high = bits.amax(1, keepdim=True)
        low = (bits - 1 & 0x7FFFFFFF).amin(1, keepdim=True) + 1  # of those above 0
        low = torch.maximum(low, torch.where(high > 0, (high - (OCTAVES << 23)).clamp_min(1), 0))
        step = _step(low, high)
        level = (bits - low).to(torch.float32) * (1.0 / step)
        nearest = torch.round(level)
        rounded = torch.where((level - nearest).abs() < SNAP, nearest, torch.floor(level + random)).clamp(0.0, LEVELS)
        span = (high - low).to(torch.float32).to(torch.int32)
        above = torch.round(rounded * step).to(torch.int32)
        last = (torch.maximum(above - span, bits - high) + 1).clamp(0, 1)  # 1 for what is not below the largest
        codes = torch.maximum(rounded.to(torch.int32), last * int(LEVELS)) + 1
        return (codes * bits.clamp_max(1)).to(torch.uint8), torch.cat([low, high], 1).view(torch.float32)

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        ends = scales.contiguous().view(torch.int32)
        low, high = ends[:, :1], ends[:, 1:]
        level = codes.to(torch.int32)
        bits = low + torch.round((level - 1).to(torch.float32) * _step(low, high)).to(torch.int32)
        bits = bits + (level - int(LEVELS)).clamp_min(0) * (high - bits)  # the last code is the largest value itself
        return (bits * level.clamp_max(1)).view(torch.float32)


def _step(low: Tensor, high: Tensor) -> Tensor:
    """Units in the last place between two codes, float32."""
    return ((high - low).to(torch.float32) * (1.0 / LEVELS)).clamp_min(FINEST)
