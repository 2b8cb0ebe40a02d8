"""ACProp: Zhuang et al. 2021, arXiv 2110.05454; centred second moment, one step behind the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor
from .radam import rectification


def acprop(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    amsgrad: bool = False,
    momentum_update: bool = False,
    rectify: bool = False,
    ratio_clip: float = 0.0,
    maximize: bool = False,
) -> History:
    """theta - eta N / (sqrt(s_{t-1}) debiased + eps), then s <- beta2 s + (1 - beta2)(g - m)^2."""
    beta1, beta2 = betas

    def ratio(numerator: Array, denominator: Array) -> Array:
        n = np.asarray(numerator / denominator)
        return np.clip(n, -ratio_clip, ratio_clip) if ratio_clip > 0 else n

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled else g + weight_decay * theta
        share = eta * weight_decay if decoupled else 0.0
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        m_hat = s["m"] / (1 - beta1**t)
        numerator = m_hat if momentum_update else g
        if t >= 2 or amsgrad:
            s["s"] = s["s"] + eps
        s["s_max"] = np.maximum(s["s_max"], s["s"])
        w = s["s_max"] if amsgrad else s["s"]
        r = rectification(t, beta2) if rectify else None
        if t == 1 or (rectify and r is None):
            u = eta * m_hat
        elif r is not None:
            u = eta * r * math.sqrt(1 - beta2**t) * ratio(numerator, np.sqrt(w) + eps)
        else:
            w_hat = w / (1 - beta2 ** (t - 1))
            u = eta * ratio(numerator, np.sqrt(w_hat) + eps)
        s["s"] = beta2 * s["s"] + (1 - beta2) * (g - s["m"]) ** 2
        return moved(theta, u, raw, share)

    zeros = ("m", "s", "s_max")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
