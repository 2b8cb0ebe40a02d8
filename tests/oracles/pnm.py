"""PNM and AdaPNM: Xie et al. 2021, arXiv 2103.17182; two momenta, fed on odd and on even steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def positive_negative(s: Slots, g: Array, t: int, beta1: float, beta0: float) -> Array:
    """Feed the momentum of this step's parity; return the fresh one against the stale one."""
    fresh, stale = ("M0", "M1") if t % 2 == 1 else ("M1", "M0")
    s[fresh] = beta1**2 * s[fresh] + (1 - beta1**2) * g
    nu = math.sqrt((1 + beta0) ** 2 + beta0**2)
    return np.asarray(((1 + beta0) * s[fresh] - beta0 * s[stale]) / nu)


def pnm(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 1.0),
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
) -> History:
    """theta - eta [(1 + beta0) M_fresh - beta0 M_stale] / nu, without bias correction."""
    beta1, beta0 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled else g + weight_decay * theta
        share = eta * weight_decay if decoupled else 0.0
        return moved(theta, eta * positive_negative(s, g, t, beta1, beta0), raw, share)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("M0", "M1"))


def adapnm(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 1.0),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = True,
    decoupled: bool = True,
    maximize: bool = False,
) -> History:
    """Adam's denominator under the positive-negative momentum."""
    beta1, beta2, beta0 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled else g + weight_decay * theta
        share = eta * weight_decay if decoupled else 0.0
        mu = positive_negative(s, g, t, beta1, beta0)
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        s["v_max"] = np.maximum(s["v_max"], s["v"])
        w = s["v_max"] if amsgrad else s["v"]
        return moved(theta, eta / (1 - beta1**t) * mu / (np.sqrt(w / (1 - beta2**t)) + eps), raw, share)

    zeros = ("M0", "M1", "v", "v_max")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)
