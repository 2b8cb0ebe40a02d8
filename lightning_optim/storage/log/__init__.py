"""Logarithms of second moments, with dithered rounding.

In one step a second moment changes by about a thousandth, far less than the distance of two 8-bit codes. Rounding to
the nearest code would freeze it, or let it only grow. What is added before rounding (`dither`) is spread evenly over
steps and elements, so rounding has the right mean, and the errors of successive steps cancel.

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

LEVELS = 254  # steps from code 1, the smallest positive value of the block, to code 255, the largest
FINEST = 2048  # the least size of a step, in units in the last place
WHOLE = 8388608.0  # from 2^23 to 2^24 float32 holds the integers: adding it rounds to the nearest, ties to even
COARSEST = 1321040  # the largest: all levels are 2^40, and smaller values are raised to the lowest level


@dataclass(frozen=True)
class Log(Format):
    """Code 0 is zero. Codes 1 to 255 are evenly spaced in the logarithm between the smallest and the largest value.

    The scales of a block are its smallest positive value and the distance of two codes, in units in the last place.
    That distance is a whole number, so the largest value is stored within 127 of these units. A positive value never
    becomes zero. A dequantized block is quantized to the same codes: its smallest value is stored exactly, its largest
    gives the same distance, and levels are found with an error below the least that dither leaves to the next code.
    """

    name: ClassVar[str] = "log"
    scales_per_block: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    takes_nan: ClassVar[bool] = True

    def quantize(self, x: Tensor, partner: Tensor | None, dither: Tensor | None) -> tuple[Tensor, Tensor]:
        assert dither is not None
        bits = x.view(torch.int32).clamp_min(0)  # 0 where a value is not positive
        high = bits.amax(1, keepdim=True)
        low = (bits - 1 & 0x7FFFFFFF).amin(1, keepdim=True) + 1  # the minimum of the positive ones
        low = torch.where(high > 0, torch.maximum(low, high - LEVELS * COARSEST), 0)
        span = (high - low).clamp_min(LEVELS * FINEST).to(torch.float32)
        step = torch.round(span * (1.0 / LEVELS))
        level = (torch.maximum(bits, low) - low).to(torch.float32) * (1.0 / span * LEVELS)
        codes = (level + dither + (WHOLE + 1.0) - WHOLE).to(torch.int32) * bits.clamp_max(1)
        return codes.to(torch.uint8), torch.cat([low.view(torch.float32), step], 1)

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        low, step = scales[:, :1].contiguous().view(torch.int32), scales[:, 1:].to(torch.int32)
        level = codes.to(torch.int32)
        return (level - 1).mul_(step).add_(low).mul_(level.clamp_max_(1)).view(torch.float32)
