"""RMSprop: Tieleman & Hinton 2012, lecture 6.5; centred form of Graves 2013, arXiv 1308.0850."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def rmsprop(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    eps_in_sqrt: bool = False,
    tf_style: bool = False,
    maximize: bool = False,
) -> History:
    """theta - eta g / (sqrt(v) + eps); tf_style: v starts at 1, eps in the root, rate in the buffer."""

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        if t == 1:
            s["v"] = np.ones_like(theta) if tf_style else np.zeros_like(theta)
        raw, g = g, g + weight_decay * theta
        s["v"] = alpha * s["v"] + (1 - alpha) * g**2
        w = s["v"]
        if centered:
            s["g_mean"] = alpha * s["g_mean"] + (1 - alpha) * g
            w = s["v"] - s["g_mean"] ** 2
        denominator = np.sqrt(w + eps) if eps_in_sqrt or tf_style else np.sqrt(w) + eps
        if momentum == 0:
            return moved(theta, eta * g / denominator, raw)
        if tf_style:
            s["b"] = momentum * s["b"] + eta * g / denominator
            return moved(theta, s["b"], raw)
        s["b"] = momentum * s["b"] + g / denominator
        return moved(theta, eta * s["b"], raw)

    zeros = ("g_mean", "b")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
