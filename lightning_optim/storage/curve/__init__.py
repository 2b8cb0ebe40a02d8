"""Signed values relative to the largest of their block, on a scale that is denser near zero.

The scale is that of the bits of a float32, as in the logarithmic format: they grow evenly from one power of two to the
next, and twice as slowly from there on. A value of size y, in units of the largest of the block, is moved away from
zero to w = 2 + y * WIDTH, whose bits are cut to a code. So near zero codes are evenly spaced, further out their
distance grows with the value, and no engine computes a logarithm or divides by an element: all find the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage.format import Format

SHIFT = 19  # 2^(23 - SHIFT) codes in an octave of w, so 127 codes of either sign are 8 octaves
ORIGIN = 0x40000000  # the bits of w = 2, where y is 0: those that become the code are zero there
SMALLEST = 2.0**-118  # a block with no larger value is stored as zeros: the reciprocal of its scale could overflow
WIDTH = {18: 29.5, 19: 494.0}  # w for the largest value less 2, by shift: the bits of w are ORIGIN + (127 << shift)


def codes_of(x: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """The codes, uint8, and the scale of blocks of values, (blocks, BLOCK) float32.

    Bits 0 to 6 of a code are the size, and bit 7 is the sign.
    """
    scale = x.abs().amax(1, keepdim=True)
    scale = torch.where((scale > SMALLEST) & (scale < torch.inf), scale, 0.0)
    # In two factors, since the reciprocal of a large scale is below the normal numbers.
    per_scale = torch.where(scale > 0, 1.0 / (scale * 0.25), 0.0) * (WIDTH[shift] * 0.25)
    w = (x.abs() * per_scale + 2.0).view(torch.int32)
    size = w + (1 << (shift - 1)) >> shift  # more bits than 7, the next of which is zero
    return (size | (x.contiguous().view(torch.int32) >> 24 & 128)).to(torch.uint8), scale


def values_of(codes: Tensor, scale: Tensor, shift: int) -> Tensor:
    """The values of codes, float32. Memory is used again, since a save dequantizes whole slots."""
    code = codes.to(torch.int32)
    bits = (code & 127).bitwise_left_shift_(shift).add_(ORIGIN)
    values = bits.view(torch.float32)
    values.sub_(2.0).mul_(1.0 / WIDTH[shift]).mul_(scale)  # exactly the scale for the largest code
    bits.bitwise_or_(code.bitwise_and_(128).bitwise_left_shift_(24))
    return values


@dataclass(frozen=True)
class Curve(Format):
    """Codes 0 to 127 are positive and 128 to 255 negative, both from zero to the largest size of the block.

    The scale is that size, which is stored exactly, so a dequantized block is quantized to the same codes.
    """

    name: ClassVar[str] = "curve"
    takes_nan: ClassVar[bool] = True

    def quantize(self, x: Tensor, partner: Tensor | None, dither: Tensor | None) -> tuple[Tensor, Tensor]:
        return codes_of(x, SHIFT)

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        return values_of(codes, scales, SHIFT)
