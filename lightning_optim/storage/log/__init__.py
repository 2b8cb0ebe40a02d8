"""Logarithms of second moments, with stochastic rounding.

In one step a second moment changes by about a thousandth, far less than the distance of two 8-bit codes. Rounding to
the nearest code would freeze it, or let it only grow. Stochastic rounding has the right mean.

The logarithm is that of the float32 format: the bits of a positive number, read as an integer, grow with its logarithm
to base 2, linearly from one power of two to the next. So no logarithm is computed, and every engine finds the same
codes to the last bit. Between two codes of the same octave the expected value after rounding is the value itself.
Between codes of different octaves it is too large by up to an eighth of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage.format import Format

OCTAVES = 40  # the largest ratio of two positive values in a block is 2^40; smaller values are raised to it
LEVELS = 254.0  # steps from code 1, the smallest positive value of the block, to code 255, the largest
FINEST = 2048.0  # the least size of a step in units in the last place, so that dequantized values are on their levels
SNAP = 2.0**-10  # values this near to a level are not rounded stochastically, so dequantized values keep their codes


@dataclass(frozen=True)
class Log(Format):
    """Code 0 is zero. Codes 1 to 255 are evenly spaced in the logarithm between the smallest and the largest value.

    The scales of a block are its smallest positive and its largest value in float32. So both are stored exactly, and a
    dequantized block is quantized to the same codes. A positive value never becomes zero.
    """

    name: ClassVar[str] = "log"
    scales_per_block: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    def quantize(self, x: Tensor, partner: Tensor | None, random: Tensor | None) -> tuple[Tensor, Tensor]:
        assert random is not None
        bits = x.view(torch.int32).clamp_min(0)  # 0 where a value is not positive
        high = bits.amax(1, keepdim=True)
        low = (bits - 1 & 0x7FFFFFFF).amin(1, keepdim=True) + 1  # the minimum of the positive ones
        low = torch.maximum(low, torch.where(high > 0, (high - (OCTAVES << 23)).clamp_min(1), 0))
        step = _step(low, high)
        level = (bits - low).to(torch.float32) * (1.0 / step)
        nearest = torch.round(level)
        rounded = torch.where((level - nearest).abs() < SNAP, nearest, torch.floor(level + random)).clamp(0.0, LEVELS)
        span = (high - low).to(torch.float32).to(torch.int32)
        above = torch.round(rounded * step).to(torch.int32)
        last = (torch.maximum(above - span, bits - high) + 1).clamp(0, 1)  # 1 for the largest value
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
    """The distance of two codes in units in the last place, float32."""
    return ((high - low).to(torch.float32) * (1.0 / LEVELS)).clamp_min(FINEST)
