"""diffGrad: Dubey et al. 2019, arXiv 1909.11015 (the corrected second version of the authors' program)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def diffgrad(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> History:
    """Adam (eps-hat form) times the friction xi = sigmoid(|g_{t-1} - g_t|)."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g + weight_decay * theta
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        xi = 1 / (1 + np.exp(-np.abs(s["g_previous"] - g)))
        s["g_previous"] = g
        rate = eta * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        return moved(theta, rate * xi * s["m"] / (np.sqrt(s["v"]) + eps), raw)

    zeros = ("m", "v", "g_previous")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
