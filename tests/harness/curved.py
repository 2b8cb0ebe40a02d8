"""Losses whose matrices of second derivatives are known: those of methods with worked numbers, and of small nets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy

from tests.harness.nets import Wide

Matrix = Literal["hessian", "ggn"]


def waves(*shape: int, a: float, b: float, s: float) -> Tensor:
    """Element number i in row-major order is s sin(a i + b)."""
    return (s * torch.sin(a * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + b)).view(shape)


def eight() -> Tensor:
    """A symmetric matrix of eight rows with worked numbers; three eigenvalues are negative."""
    i = torch.arange(8, dtype=torch.float64)
    mixed = (torch.cos(i[:, None] + 2 * i) + torch.cos(i + 2 * i[:, None])) / 2
    return mixed + torch.diag(torch.tensor([6, -1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64))


def tiny_net() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net of 31 parameters with worked numbers, and the six samples on which they were computed."""
    inward, out = nn.Linear(3, 4), nn.Linear(4, 3)
    net = nn.Sequential(inward, nn.Tanh(), out).double()
    with torch.no_grad():
        inward.weight.copy_(waves(4, 3, a=1.1, b=0.3, s=0.9))
        inward.bias.zero_()
        out.weight.copy_(waves(3, 4, a=0.7, b=1.7, s=1.3))
        out.bias.copy_(waves(3, a=2.3, b=0.4, s=0.2))
    x = torch.cat([waves(2, 3, a=1.3 + 0.17 * k, b=0.5 + 0.31 * k, s=1.5) for k in range(3)])
    labels = torch.tensor([number for k in range(3) for number in (k % 3, (2 * k + 1) % 3)])
    return net, x, labels


class Small(nn.Module):
    """Sizes that do not divide; one weight that the loss does not use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward = Wide(3, 5)
        self.unused = Wide(2, 3)
        self.out = nn.Linear(5, 3)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.frozen(torch.tanh(self.inward(x)))))  # type: ignore[no-any-return]

    def trainable(self) -> list[Tensor]:
        return [p for p in self.parameters() if p.requires_grad]


def samples(rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    """Of eight samples the part of a rank."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x.chunk(size)[rank], (torch.arange(8) % 3).chunk(size)[rank]


def closure_of(model: nn.Module, operator: Matrix = "hessian", rank: int = 0, size: int = 1) -> Callable[[], Any]:
    """The loss of a small net on the samples of a rank."""
    x, y = samples(rank, size)
    x = x.to(next(model.parameters()).dtype)
    if operator == "hessian":
        return lambda: cross_entropy(model(x), y)
    return lambda: (model(x), lambda outputs: cross_entropy(outputs, y))


def matrix_of(model: nn.Module, operator: Matrix, data: tuple[Tensor, Tensor]) -> Tensor:
    """The matrix of second derivatives itself, written out, in the order of the parameters."""
    kept = {name: p.detach() for name, p in model.named_parameters()}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = [kept[name].numel() for name in names]
    x, y = data

    def outputs(flat: Tensor) -> Tensor:
        parts = dict(zip(names, torch.split(flat, sizes), strict=True))
        changed: Mapping[str, Tensor] = {name: part.view(kept[name].shape) for name, part in parts.items()}
        return functional_call(model, {**kept, **changed}, x)  # type: ignore[no-any-return]

    at = torch.cat([kept[name].reshape(-1) for name in names])
    if operator == "hessian":
        return hessian(lambda flat: cross_entropy(outputs(flat), y))(at)  # type: ignore[no-any-return]
    jacobian = jacrev(outputs)(at).reshape(-1, len(at))
    curved = hessian(lambda o: cross_entropy(o.view(len(y), -1), y))(outputs(at).reshape(-1))
    return jacobian.T @ curved @ jacobian  # type: ignore[no-any-return]
