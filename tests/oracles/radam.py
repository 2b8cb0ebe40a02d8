"""RAdam: Liu et al. 2019, arXiv 1908.03265."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def rectification(t: int, beta2: float, threshold: float = 5.0) -> float | None:
    """The factor r_t, or None while the variance of the second moment is not tractable."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= threshold:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def radam(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    threshold: float = 5.0,
    fallback: Literal["momentum", "skip"] = "momentum",
    maximize: bool = False,
) -> History:
    """Adam (eps-hat form) scaled by r_t; before that momentum steps, or no steps and no decay ("skip")."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        r = rectification(t, beta2, threshold)
        raw, g = g, g if decoupled_weight_decay else g + weight_decay * theta
        share = eta * weight_decay if decoupled_weight_decay else 0.0
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        c1 = 1 - beta1**t
        c2 = 1 - beta2**t
        if r is not None:
            return moved(theta, eta * r * math.sqrt(c2) / c1 * s["m"] / (np.sqrt(s["v"]) + eps), raw, share)
        if fallback == "momentum":
            return moved(theta, eta * s["m"] / c1, raw, share)
        return theta

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "v"))
