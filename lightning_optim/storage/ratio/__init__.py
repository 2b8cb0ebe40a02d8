"""First moments relative to the square root of the second moment.

The ratio is bounded, and has about the same size all over a block even where gradients differ by orders of magnitude.
Quantizing and dequantizing use the same dequantized second moment, so its error cancels. For the same reason the root
may be approximate. It is a power of two, within a factor of the root of two: so its reciprocal and both products are
exact, and are found by halving the exponent of a float. What is left of the ratio has the codes of `curve`, with more
of them for sizes that matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage import curve
from lightning_optim.storage.format import Format

SHIFT = 18  # 32 codes in an octave, so 127 codes of either sign are 4 octaves
EXPONENT = 0x7F000000  # the bits of the exponent without the last, whose half is whole
ROOT, PER_ROOT = 0x20000000, 0x5F000000  # what the halves are added to and subtracted from: 1 stays 1


def root(v: Tensor) -> Tensor:
    """A power of two near sqrt(v) for float32 `v` >= 0, and 1.1e-19 for 0."""
    return (ROOT + ((v.contiguous().view(torch.int32) & EXPONENT) >> 1)).view(torch.float32)


def per_root(v: Tensor) -> Tensor:
    """The reciprocal of `root`, but 0 for 0."""
    bits = v.contiguous().view(torch.int32)
    return (PER_ROOT * bits.clamp_max(1) - ((bits & EXPONENT) >> 1)).view(torch.float32)


@dataclass(frozen=True)
class Ratio(Format):
    """The codes of `Curve`, in units of the largest ratio of the block, which is stored exactly.

    A value whose root is zero is stored as zero.

    Attributes:
        partner: The slot of squares relative to whose root values are quantized.
    """

    name: ClassVar[str] = "ratio"
    takes_nan: ClassVar[bool] = True
    partner: str | None = field()

    def quantize(self, x: Tensor, partner: Tensor | None, dither: Tensor | None) -> tuple[Tensor, Tensor]:
        assert partner is not None
        return curve.codes_of(x * per_root(partner), SHIFT)

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        assert partner is not None
        return curve.values_of(codes, scales, SHIFT).mul_(root(partner))

    def cpp(self) -> str:
        return curve.Curve().cpp() + super().cpp()
