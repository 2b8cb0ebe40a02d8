"""Second moments by their logarithm, rounded stochastically.

A second moment moves by a thousandth in a step, far less than one code of eight bits, so nearest rounding freezes it
or lets it climb only. Rounding up with the probability of the remainder is right on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OCTAVES = 40.0  # smaller values than the block's largest by more than this are kept at that
LEVELS = 254.0  # steps between code 1, the smallest positive value, and code 255, the largest
SNAP = 2.0**-10  # as near to a level as this is on it: decoded values go back to their codes


@dataclass(frozen=True)
class Log:
    """Code 0 is zero; codes 1 to 255 divide the logarithm between the block's smallest and largest value evenly.

    The header holds these two as they are, so that they decode exactly and a decoded block encodes to itself. A
    positive value never becomes zero.
    """

    partner: str | None = None
    name: str = "log"
    headers: int = 2
    stochastic: bool = True

    def encode(self, x: Tensor, partner: Tensor | None, draw: Tensor | None) -> tuple[Tensor, Tensor]:
        assert draw is not None
        positive = x > 0
        high = x.amax(1, keepdim=True).clamp_min(0.0)
        low = torch.where(positive, x, high).amin(1, keepdim=True)
        low = torch.maximum(low, high * 2.0**-OCTAVES)
        base, span = _spans(low, high)
        level = (torch.log2(torch.where(positive, x, low)) - base) * (LEVELS / span)
        nearest = torch.round(level)
        rounded = torch.where((level - nearest).abs() < SNAP, nearest, torch.floor(level + draw))
        rounded = torch.where(span > TINY, rounded, LEVELS)
        codes = torch.where(positive, rounded.nan_to_num(0.0).clamp(0.0, LEVELS) + 1.0, 0.0)
        # The largest and the smallest keep their codes, whatever is drawn.
        codes = torch.where(positive & (x >= high), LEVELS + 1.0, codes)
        return codes.to(torch.uint8), torch.cat([low, high], 1)

    def decode(self, codes: Tensor, headers: Tensor, partner: Tensor | None) -> Tensor:
        low, high = headers[:, :1], headers[:, 1:]
        base, span = _spans(low, high)
        value = torch.exp2(base + (codes.to(torch.float32) - 1.0) * (span / LEVELS))
        value = torch.where(codes == 1, low, torch.where(codes == 255, high, value))
        return torch.where(codes == 0, 0.0, value)


TINY = 1e-30  # a span of this stands for none


def _spans(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the smallest value, and the distance to that of the largest."""
    base = torch.log2(torch.where(low > 0, low, 1.0))
    top = torch.log2(torch.where(high > 0, high, 1.0))
    return base, (top - base).clamp_min(TINY)
