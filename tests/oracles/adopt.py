"""ADOPT: Taniguchi et al. 2024, arXiv 2411.02853; normalized by the second moment of the step before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def adopt(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    clip_power: float | None = 0.25,
    decoupled: bool = True,
    maximize: bool = False,
) -> History:
    """The first gradient only starts the second moment; no bias corrections."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled else g + weight_decay * theta
        if t == 1:
            s["v"] = g**2
            return theta
        normalized = g / np.maximum(np.sqrt(s["v"]), eps)
        if clip_power is not None:
            bound = (t - 1) ** clip_power
            normalized = np.clip(normalized, -bound, bound)
        s["m"] = beta1 * s["m"] + (1 - beta1) * normalized
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        return moved(theta, eta * s["m"], raw, eta * weight_decay if decoupled else 0.0)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "v"))
