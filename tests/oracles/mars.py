"""MARS-AdamW: Yuan, Liu, Wu, Zhou & Gu 2024, arXiv 2411.10438, with the last batch's gradient; others by AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, norm, run_per_tensor


def mars(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gamma: float = 0.025,
    optimize_1d: bool = False,
    lr_1d: float = 3e-3,
    base_lr: float | None = None,
    betas_1d: tuple[float, float] = (0.9, 0.95),
    weight_decay_1d: float = 0.1,
    maximize: bool = False,
) -> History:
    """Two axes or more: the gradient plus a share of its change, clipped to norm 1. The last gradient starts at 0."""

    def adamw(theta: Array, g: Array, c: Array, s: Slots, t: int, eta: float, plain: bool) -> Array:
        beta1, beta2 = betas_1d if plain else betas
        decay = weight_decay_1d if plain else weight_decay
        s["m"] = beta1 * s["m"] + (1 - beta1) * c
        s["v"] = beta2 * s["v"] + (1 - beta2) * c**2
        direction = s["m"] / (1 - beta1**t) / (np.sqrt(s["v"]) / np.sqrt(1 - beta2**t) + eps)
        return moved(theta, eta * direction, g, eta * decay)

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        if theta.ndim < 2 and not optimize_1d:
            return adamw(theta, g, g, s, t, lr_1d / (base_lr or lr) * eta, plain=True)
        c = g + gamma * (betas[0] / (1 - betas[0])) * (g - s["last"])
        if norm(c) > 1:
            c = c / norm(c)
        s["last"] = g
        return adamw(theta, g, c, s, t, eta, plain=False)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "v", "last"))
