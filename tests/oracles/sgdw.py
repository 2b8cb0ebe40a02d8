"""SGDW: Loshchilov & Hutter 2019, arXiv 1711.05101; learning rate outside the momentum buffer."""

from __future__ import annotations

from collections.abc import Sequence

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def sgdw(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> History:
    """Heavy ball whose first buffer is the undamped gradient; decay (1 - eta lambda) theta first."""

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        s["b"] = g if t == 1 else momentum * s["b"] + (1 - dampening) * g
        d = g + momentum * s["b"] if nesterov else s["b"]
        return moved(theta, eta * d, g, eta * weight_decay)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize)


def sgdw_paper(
    params: Params,
    gradients: Gradients,
    *,
    alpha: float,
    multipliers: Sequence[float],
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> History:
    """Paper form, rate inside the buffer: b <- mu b + eta_t alpha g; theta - b - eta_t lambda theta."""

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        s["b"] = momentum * s["b"] + eta * alpha * g
        return theta - s["b"] - eta * weight_decay * theta

    return run_per_tensor(step, params, gradients, lr=1.0, lrs=multipliers, maximize=False, zeros=("b",))
