"""Adan: Xie et al. 2022, arXiv 2208.06677, with the authors' bias corrections; betas are decays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, decays, global_norm, kept, moved, run_per_tensor


def adan(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    no_prox: bool = False,
    maximize: bool = False,
) -> History:
    """Momentum of g, momentum of the difference, second moment of g + beta2 difference."""
    beta1, beta2, beta3 = betas

    def clip(g: Sequence[Array | None]) -> list[Array | None]:
        factor = min(1.0, max_grad_norm / (global_norm(g) + eps))
        return [None if x is None else factor * x for x in g]

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        if t == 1:
            s["g_previous"] = g
        delta = g - s["g_previous"]
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["d"] = beta2 * s["d"] + (1 - beta2) * delta
        u = g + beta2 * delta
        s["n"] = beta3 * s["n"] + (1 - beta3) * u**2
        c1, c2, c3 = 1 - beta1**t, 1 - beta2**t, 1 - beta3**t
        direction = (s["m"] / c1 + beta2 * s["d"] / c2) / (np.sqrt(s["n"] / c3) + eps)
        s["g_previous"] = g
        if no_prox:
            return moved(theta, eta * direction, g, eta * weight_decay)
        return (theta - kept(eta * direction, g)) / (1 + eta * weight_decay * decays(theta, direction))

    if max_grad_norm > 0:
        gradients = [clip(g) for g in gradients]
    zeros = ("m", "d", "n")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
