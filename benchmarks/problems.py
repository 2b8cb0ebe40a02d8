"""Tensors and gradients to drive any registered optimizer with, without knowing which it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer

SHAPES = ((), (5,), (3, 4), (2, 3, 4), (0,), (4, 2, 3, 3))
LEARNING_RATE = 0.01
STATEFUL: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}  # by default it keeps none


def make_params(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Parameters with fixed random values."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def gradients(
    steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 2
) -> Iterator[list[Tensor]]:
    """Fixed random gradients for some steps, of several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        scale = (1.0, 0.1, 3.0)[step % 3]
        yield [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def loss_of(step: int) -> tuple[float, float]:
    """A mean loss and a mean squared loss for optimizers that read them."""
    return 1.5 / (1 + 0.1 * step), 2.5 / (1 + 0.1 * step)


def apply(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None], step: int = 0) -> None:
    """One step with given gradients, through a closure as a Trainer calls it."""

    def closure() -> float:
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        if optimizer.inputs:
            optimizer.set_loss(*loss_of(step))
        return 0.0

    optimizer.step(closure)


def build(name: str, params: Any, **options: Any) -> Optimizer:
    """An optimizer of the registry, at a learning rate at which things move visibly unless one is given, with state."""
    return OPTIMIZERS[name](params, **{"lr": LEARNING_RATE, **STATEFUL.get(name, {}), **options})
