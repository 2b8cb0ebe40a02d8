"""Adagrad: Duchi, Hazan & Singer 2011, JMLR 12; with the decay of the rate and the L2 penalty of torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def adagrad(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> History:
    """theta - eta_t g / (sqrt(sum of g^2) + eps) with eta_t = eta / (1 + (t - 1) kappa)."""

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g + weight_decay * theta
        before = s.get("G", np.full_like(theta, initial_accumulator_value))
        s["G"] = before + np.square(g)
        return moved(theta, eta / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s["G"]) + eps), raw)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize)
