"""NAdam: Dozat 2016, Algorithm 2, with torch's schedule of the momentum; and NAdamW, one look ahead without it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def nadam(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float | None = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> History:
    """The mean that Nesterov would take one step later over the root of the corrected mean square."""
    beta1, beta2 = betas

    def momentum(i: int) -> float:
        """The decay of the first moment in step i."""
        return beta1 if momentum_decay is None else beta1 * (1 - 0.96 ** (i * momentum_decay) / 2)

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g if decoupled_weight_decay else g + weight_decay * theta
        share = eta * weight_decay if decoupled_weight_decay else 0.0
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        root = np.sqrt(s["v"] / (1 - beta2**t)) + eps
        if momentum_decay is None:
            return moved(theta, eta * (beta1 * s["m"] + (1 - beta1) * g) / (1 - beta1**t) / root, raw, share)
        known = np.prod([momentum(i) for i in range(1, t + 1)])
        g_hat = g / (1 - known)
        m_hat = s["m"] / (1 - known * momentum(t + 1))
        return moved(theta, eta * ((1 - momentum(t)) * g_hat + momentum(t + 1) * m_hat) / root, raw, share)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "v"))
