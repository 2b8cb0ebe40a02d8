"""First moments as their ratio to the root of the second moment.

The ratio is bounded and of one size all over a block, however the gradients differ there; and since it is taken to
the root as it will be dequantized, the error of that cancels. So it need not be the root to the last bit either:
halving a float's bits, which are its logarithm, halves its exponent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage.format import Format

CURVE = 2.0  # codes are denser near zero by 1 + CURVE than without companding
WIDEST = 127.0 * (1.0 + CURVE)  # code k stands for k / (WIDEST - CURVE |k|) of the scale


def per_root(v: Tensor) -> Tensor:
    """About 1 / root of float32 `v` >= 0: straight lines between powers of two, within 6 %, and 1.4e19 for 0."""
    return (0x5F400000 - (v.contiguous().view(torch.int32) >> 1)).view(torch.float32)


@dataclass(frozen=True)
class Ratio(Format):
    """Codes 1 to 255 are -127 to 127 on a companded scale; the scale is the block's largest ratio.

    Zero stays zero, and the largest ratio, of either sign, has a code of its own. Code 0 does not occur.

    Attributes:
        partner: The slot in whose root values are measured.
    """

    name: ClassVar[str] = "ratio"
    partner: str | None = field()

    def quantize(self, x: Tensor, partner: Tensor | None, random: Tensor | None) -> tuple[Tensor, Tensor]:
        assert partner is not None
        some = partner.contiguous().view(torch.int32).clamp(0, 1)  # 0 where there is no root to measure in
        ratio = x * some * per_root(partner)
        # Eight bits of the scale: a dequantized block has it again, however its ratios are rounded in float32.
        scale = ratio.abs().amax(1, keepdim=True).to(torch.bfloat16).to(torch.float32)
        code = torch.round(WIDEST * ratio / (torch.where(scale > 0, scale, 1.0) + CURVE * ratio.abs()))
        return (code.clamp(-127.0, 127.0).to(torch.int32) + 128).to(torch.uint8), scale

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        assert partner is not None
        k = codes.to(torch.float32) - 128.0
        return k * scales / ((WIDEST - CURVE * k.abs()) * per_root(partner))
