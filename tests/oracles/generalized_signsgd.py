"""Generalized SignSGD: Crawshaw et al. 2022, arXiv 2208.11195."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def generalized_signsgd(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    use_bias_correction: bool = False,
    decoupled: bool = False,
    maximize: bool = False,
) -> History:
    """Adam whose second moment averages the square of the momentum just updated."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled else g + weight_decay * theta
        share = eta * weight_decay if decoupled else 0.0
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * s["m"] ** 2
        b1 = 1 - beta1**t if use_bias_correction else 1.0
        b2 = 1 - beta2**t if use_bias_correction else 1.0
        return moved(theta, eta * (s["m"] / b1) / (np.sqrt(s["v"] / b2) + eps), raw, share)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "v"))
