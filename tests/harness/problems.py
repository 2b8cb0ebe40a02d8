"""What drives any registered optimizer, shared with the benchmarks, and what came of it as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problems import LEARNING_RATE, SHAPES, apply, build, gradients, loss_of, make_params
from lightning_optim.core.optimizer import OPTIMIZERS

__all__ = [
    "LEARNING_RATE",
    "NAMES",
    "SHAPES",
    "apply",
    "build",
    "flat",
    "gradients",
    "loss_of",
    "make_params",
    "moving",
    "train",
    "trajectory",
]

NAMES = sorted(OPTIMIZERS)


def moving(name: str) -> dict[str, Any]:
    """The options under which an optimizer moves in its first step."""
    silent = name in OPTIMIZERS and "silent_sgd_phase" in OPTIMIZERS[name].options
    return {"silent_sgd_phase": False} if silent else {}


def train(net: nn.Module, optimizer: Any, steps: int) -> None:
    """Take steps on the mean square of what a network of four inputs makes of ones."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        if optimizer.inputs:
            optimizer.set_loss(loss)
        optimizer.step()


def trajectory(
    name: str,
    steps: int = 8,
    dtype: torch.dtype = torch.float64,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> Tensor:
    """All iterates of a run, as one vector."""
    params = make_params(shapes, dtype)
    optimizer = build(name, params, **options)
    iterates = []
    for step, grads in enumerate(gradients(steps, shapes, dtype)):
        apply(optimizer, params, grads, step)
        iterates += [p.detach().clone().reshape(-1) for p in params]
    return torch.cat(iterates)


def flat(params: Sequence[Tensor]) -> Tensor:
    """The values of parameters as one vector."""
    return torch.cat([p.detach().clone().reshape(-1) for p in params])
