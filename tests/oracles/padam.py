"""Padam: Chen et al. 2018, arXiv 1806.06763; Adam's denominator to the power 2 p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def padam(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    partial: float = 0.25,
    amsgrad: bool = True,
    decoupled: bool = False,
    debias: Literal["official", "consistent", "none"] = "official",
    maximize: bool = False,
) -> History:
    """theta - eta m / (sqrt(w) + eps)^{2p}, with one of three bias corrections."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled else g + weight_decay * theta
        share = eta * weight_decay if decoupled else 0.0
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        s["v_max"] = np.maximum(s["v_max"], s["v"])
        w = s["v_max"] if amsgrad else s["v"]
        c1 = 1 - beta1**t
        c2 = 1 - beta2**t
        if debias == "official":
            return moved(theta, eta * math.sqrt(c2) / c1 * s["m"] / (np.sqrt(w) + eps) ** (2 * partial), raw, share)
        if debias == "consistent":
            return moved(theta, eta / c1 * s["m"] / (np.sqrt(w / c2) + eps) ** (2 * partial), raw, share)
        return moved(theta, eta * s["m"] / (np.sqrt(w) + eps) ** (2 * partial), raw, share)

    zeros = ("m", "v", "v_max")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
