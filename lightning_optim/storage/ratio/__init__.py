"""First moments relative to the square root of the second moment.

The ratio is bounded, and has about the same size all over a block even where gradients differ by orders of magnitude.
Quantizing and dequantizing use the same dequantized second moment, so its error cancels. For the same reason the root
may be approximate: the bits of a float32 are about its logarithm, so halving them gives about the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage.format import Format

CURVE = 2.0  # near zero, codes are denser by a factor of 1 + CURVE than evenly spaced codes
WIDEST = 127.0 * (1.0 + CURVE)  # code k is the ratio k / (WIDEST - CURVE |k|) times the scale


def per_root(v: Tensor) -> Tensor:
    """1 / sqrt(v) for float32 `v` >= 0, within 6 %: linear between powers of two, and 1.4e19 for 0."""
    return (0x5F400000 - (v.contiguous().view(torch.int32) >> 1)).view(torch.float32)


@dataclass(frozen=True)
class Ratio(Format):
    """Codes 1 to 255 are -127 to 127 on a scale that is denser near zero, in units of the largest ratio of the block.

    Zero has a code of its own, and so has the largest ratio with either sign. Code 0 is not used.

    Attributes:
        partner: The slot of squares relative to whose root values are quantized.
    """

    name: ClassVar[str] = "ratio"
    partner: str | None = field()

    def quantize(self, x: Tensor, partner: Tensor | None, random: Tensor | None) -> tuple[Tensor, Tensor]:
        assert partner is not None
        some = partner.contiguous().view(torch.int32).clamp(0, 1)  # 0 where the root is zero
        ratio = x * some * per_root(partner)
        # The scale is rounded to bfloat16, so that a dequantized block has the same scale despite rounding in float32.
        scale = ratio.abs().amax(1, keepdim=True).to(torch.bfloat16).to(torch.float32)
        code = torch.round(WIDEST * ratio / (torch.where(scale > 0, scale, 1.0) + CURVE * ratio.abs()))
        return (code.clamp(-127.0, 127.0).to(torch.int32) + 128).to(torch.uint8), scale

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        assert partner is not None
        k = codes.to(torch.float32) - 128.0
        return k * scales / ((WIDEST - CURVE * k.abs()) * per_root(partner))
