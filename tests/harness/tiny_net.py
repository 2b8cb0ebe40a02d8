"""A network of 31 parameters whose weights, samples and curvature are worked numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian


def fill(shape: tuple[int, ...], a: float, b: float, s: float) -> Tensor:
    """s sin(a i + b) for the elements i = 0, 1, ... in row-major order."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (s * torch.sin(a * i + b)).view(shape)


class TinyNet(nn.Module):
    """Two layers with a tanh between them, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
        values = (fill((4, 3), 1.1, 0.3, 0.9), torch.zeros(4), fill((3, 4), 0.7, 1.7, 1.3), fill((3,), 2.3, 0.4, 0.2))
        with torch.no_grad():
            for p, value in zip(self.parameters(), values, strict=True):
                p.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inward(x)))  # type: ignore[no-any-return]


def half_batch(k: int) -> tuple[Tensor, Tensor]:
    """Two samples with their labels."""
    return fill((2, 3), 1.3 + 0.17 * k, 0.5 + 0.31 * k, 1.5), torch.tensor([k % 3, (2 * k + 1) % 3])


def six() -> tuple[Tensor, Tensor]:
    """The samples of half-batches 0, 1 and 2."""
    x, y = zip(*map(half_batch, range(3)), strict=True)
    return torch.cat(x), torch.cat(y)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def exact_hessian(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The whole matrix, in the order of the parameters."""
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)

    def of(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, values, batch[0]), batch[1])

    found: Tensor = hessian(of)(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return found
