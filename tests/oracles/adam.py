"""Adam (Kingma & Ba 2014, arXiv 1412.6980), AMSGrad (Reddi et al. 2018), AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def adam(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> History:
    """theta - eta m_hat / (sqrt(v_hat) + eps); AMSGrad keeps the maximum of the raw v."""
    beta1, beta2 = betas

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled_weight_decay else g + weight_decay * theta
        share = eta * weight_decay if decoupled_weight_decay else 0.0
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        s["v_max"] = np.maximum(s["v_max"], s["v"])
        w = s["v_max"] if amsgrad else s["v"]
        m_hat = s["m"] / (1 - beta1**t)
        w_hat = w / (1 - beta2**t)
        return moved(theta, eta * m_hat / (np.sqrt(w_hat) + eps), raw, share)

    zeros = ("m", "v", "v_max")
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=zeros)


def adamw(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    amsgrad: bool = False,
    maximize: bool = False,
) -> History:
    """Adam with theta <- (1 - eta lambda) theta before the state update."""
    return adam(
        params,
        gradients,
        lrs=lrs,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        decoupled_weight_decay=True,
        maximize=maximize,
    )
