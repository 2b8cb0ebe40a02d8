"""Feed gradients to an optimizer of the package and return every iterate, as the oracles do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lightning_optim.optimizers  # noqa: F401  (registers the pages)
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer

Array = NDArray[np.float64]
History = list[list[Array]]


def run(
    name: str,
    params: Sequence[Array],
    gradients: Sequence[Sequence[Array | None]],
    *,
    lrs: Sequence[float] | None = None,
    losses: Sequence[tuple[float, float]] | None = None,
    after_step: Callable[[int, Optimizer], None] | None = None,
    **options: Any,
) -> History:
    """The parameters after each step: `result[k][j]` for step k and tensor j."""
    tensors = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in params]
    optimizer = OPTIMIZERS[name](tensors, **options)
    history: History = []
    for k, step_gradients in enumerate(gradients):
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[k]

        def closure(k: int = k, step_gradients: Sequence[Array | None] = step_gradients) -> Tensor:
            _set_gradients(tensors, step_gradients)
            if losses is None:
                return torch.tensor(0.0)
            optimizer.set_loss(*losses[k])
            return torch.tensor(losses[k][0])

        if OPTIMIZERS[name].predicts():  # it moves the parameters before the closure runs
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        history.append([p.detach().numpy().copy() for p in tensors])
        if after_step is not None:
            after_step(k, optimizer)
    return history


def _set_gradients(tensors: Sequence[Tensor], gradients: Sequence[Array | None]) -> None:
    for p, g in zip(tensors, gradients, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=torch.float64)
