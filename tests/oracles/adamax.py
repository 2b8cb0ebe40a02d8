"""AdaMax: Kingma & Ba 2014, arXiv 1412.6980, section 7; eps inside the maximum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def adamax(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> History:
    """u <- max(beta2 u, |g| + eps); theta - eta m_hat / u."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g + weight_decay * theta
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["u"] = np.maximum(beta2 * s["u"], np.abs(g) + eps)
        return moved(theta, eta / (1 - beta1**t) * s["m"] / s["u"], raw)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "u"))
