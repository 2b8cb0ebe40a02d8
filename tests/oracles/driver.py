"""What every oracle shares: the walk over steps and tensors. No optimizer arithmetic lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = Sequence[Array]
Gradients = Sequence[Sequence[Array | None]]
Slots = dict[str, Array]
History = list[list[Array]]
Oracle = Callable[..., History]
TensorStep = Callable[[Array, Array, Slots, int, float], Array]
"""`step(theta, g, slots, t, eta)` returns the new theta; `t` counts the gradients of this tensor, from 1."""

CAUTIOUS: ContextVar[tuple[bool, bool]] = ContextVar("cautious", default=(False, False))
"""Whether steps, and whether decoupled decays, are cautious (Liang et al. 2024, arXiv 2411.16085; arXiv 2510.12402)."""


def kept(u: Array, g: Array) -> Array:
    """The step u; if it is cautious, its elements that share the sign of g, over the share of these (at least 1e-3)."""
    if not CAUTIOUS.get()[0]:
        return u
    mask = np.asarray(np.logical_or((u > 0) & (g > 0), (u < 0) & (g < 0)), dtype=np.float64)
    return np.asarray(u * mask / max(float(np.mean(mask)), 1e-3))


def decays(theta: Array, u: Array) -> Array:
    """Where theta decays: everywhere, or if the decay is cautious, where the step u does not lead it away from zero."""
    away = np.logical_or((u > 0) & (theta < 0), (u < 0) & (theta > 0))
    return np.logical_not(away & CAUTIOUS.get()[1]).astype(np.float64)


def moved(theta: Array, u: Array, g: Array, share: float = 0.0) -> Array:
    """theta after a decoupled decay by this share of it and the step u; g is the gradient without a penalty."""
    return np.asarray(theta * (1 - share * decays(theta, u)) - kept(u, g))


def start(params: Params) -> list[Array]:
    """Copy the initial parameters, in double precision."""
    return [np.array(p, dtype=np.float64) for p in params]


def snapshot(theta: Sequence[Array]) -> list[Array]:
    """Copy the parameters after one step."""
    return [np.array(x, dtype=np.float64) for x in theta]


def steps(
    gradients: Gradients, lr: float, lrs: Sequence[float] | None, maximize: bool = False
) -> Iterator[tuple[float, list[Array | None]]]:
    """Yield the learning rate and the gradients of each step, negated when maximizing."""
    sign = -1.0 if maximize else 1.0
    for k, step_gradients in enumerate(gradients):
        eta = lr if lrs is None else lrs[k]
        yield eta, [None if g is None else sign * np.asarray(g, dtype=np.float64) for g in step_gradients]


def run_per_tensor(
    step: TensorStep,
    params: Params,
    gradients: Gradients,
    *,
    lr: float,
    lrs: Sequence[float] | None,
    maximize: bool,
    zeros: Sequence[str] = (),
) -> History:
    """Apply `step` to each tensor on its own; a tensor without gradient is left out, its counter too.

    `zeros` names the slots that start as zeros of the tensor's shape.
    """
    theta = start(params)
    slots: list[Slots] = [{name: np.zeros_like(x) for name in zeros} for x in theta]
    t = [0 for _ in theta]
    history: History = []
    for eta, g in steps(gradients, lr, lrs, maximize):
        for j, g_j in enumerate(g):
            if g_j is None:
                continue
            t[j] += 1
            theta[j] = np.asarray(step(theta[j], g_j, slots[j], t[j], eta))
        history.append(snapshot(theta))
    return history


def global_norm(g: Sequence[Array | None]) -> float:
    """Euclidean norm over all tensors that have a gradient."""
    return float(np.sqrt(sum(float(np.sum(x * x)) for x in g if x is not None)))


def norm(x: Array) -> float:
    """Euclidean norm of one whole tensor."""
    return float(np.sqrt(np.sum(x * x)))
