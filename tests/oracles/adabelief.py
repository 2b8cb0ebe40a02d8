"""AdaBelief: Zhuang et al. 2020, arXiv 2010.07468, with the rectification of RAdam."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor
from .radam import rectification


def adabelief(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    rectify: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
) -> History:
    """s <- beta2 s + (1 - beta2)(g - m)^2 + eps takes the place of Adam's second moment."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled else g + weight_decay * theta
        share = eta * weight_decay if decoupled else 0.0
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["s"] = beta2 * s["s"] + (1 - beta2) * (g - s["m"]) ** 2 + eps
        s["s_max"] = np.maximum(s["s_max"], s["s"])
        w = s["s_max"] if amsgrad else s["s"]
        c1 = 1 - beta1**t
        c2 = 1 - beta2**t
        if not rectify:
            return moved(theta, eta / c1 * s["m"] / (np.sqrt(w) / math.sqrt(c2) + eps), raw, share)
        r = rectification(t, beta2)
        if r is None:
            return moved(theta, eta * s["m"] / c1, raw, share)
        return moved(theta, eta * r * math.sqrt(c2) / c1 * s["m"] / (np.sqrt(w) + eps), raw, share)

    zeros = ("m", "s", "s_max")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
