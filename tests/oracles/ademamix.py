"""AdEMAMix: Pagliardini, Ablin & Grangier 2024, arXiv 2409.03137; a fast and a slow mean of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def ademamix(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    t_alpha: float | None = None,
    t_beta3: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> History:
    """The half-life of the slow mean, in steps, grows linearly from that of the fast one; no correction of it."""
    beta1, beta2, beta3 = betas

    def half_life(beta: float) -> float:
        return float(np.log(0.5) / np.log(beta)) if beta else 0.0

    def slow_decay(t: int) -> float:
        if t_beta3 is None or t >= t_beta3:
            return beta3
        u = t / t_beta3
        return float(0.5 ** (1 / ((1 - u) * half_life(beta1) + u * half_life(beta3))))

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        weight = alpha if t_alpha is None else alpha * min(1.0, t / t_alpha)
        slow = slow_decay(t)
        s["fast"] = beta1 * s["fast"] + (1 - beta1) * g
        s["slow"] = slow * s["slow"] + (1 - slow) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        above = s["fast"] / (1 - beta1**t) + weight * s["slow"]
        below = np.sqrt(s["v"]) / np.sqrt(1 - beta2**t) + eps
        return moved(theta, eta * above / below, g, eta * weight_decay)

    zeros = ("fast", "slow", "v")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
