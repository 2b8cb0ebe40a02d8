"""A format that no engine has heard of: the nearest of 255 even steps, as a share of the block's largest value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.storage.format import Constant, Format


@dataclass(frozen=True)
class Linear(Format):
    """Codes 1 to 255 are -127 to 127 steps; the scale is the largest size of a value."""

    name: ClassVar[str] = "linear"
    steps: float = 127.0

    @property
    def constants(self) -> tuple[Constant, ...]:
        return (self.steps,)

    def quantize(self, x: Tensor, partner: Tensor | None, dither: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1, keepdim=True)
        code = torch.round(x / torch.where(scale > 0, scale, 1.0) * self.steps)
        return (code.to(torch.int32) + 128).to(torch.uint8), scale

    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        return (codes.to(torch.float32) - 128.0) / self.steps * scales
