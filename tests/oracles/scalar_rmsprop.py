"""Scalar RMSprop: one second moment for the whole vector (Su Jianlin 2018, archive 6234, reconstruction)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .driver import Array, Gradients, History, Params, moved, snapshot, start, steps


def scalar_rmsprop(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    scope: Literal["global", "tensor"] = "global",
    normalize_by_dim: bool = False,
    debias: bool = False,
    maximize: bool = False,
) -> History:
    """G <- EMA(sum of g^2 over the scope; alpha); theta - eta g / (sqrt(G) + eps).

    A step in which no tensor of the scope has a gradient leaves G and its counter alone.
    """
    theta = start(params)
    everything = list(range(len(theta)))
    scopes = [everything] if scope == "global" else [[j] for j in everything]
    G = [0.0 for _ in scopes]
    t = [0 for _ in scopes]
    history: History = []
    for eta, g in steps(gradients, lr, lrs, maximize):
        for i, members in enumerate(scopes):
            h: dict[int, Array] = {}
            for j in members:
                g_j = g[j]
                if g_j is not None:
                    h[j] = g_j if decoupled else g_j + weight_decay * theta[j]
            if not h:
                continue
            N = sum(float(np.sum(h_j**2)) for h_j in h.values())
            if normalize_by_dim:
                N = N / sum(h_j.size for h_j in h.values())
            t[i] += 1
            G[i] = alpha * G[i] + (1 - alpha) * N
            G_hat = G[i] / (1 - alpha ** t[i]) if debias else G[i]
            for j, h_j in h.items():
                raw = h_j if decoupled else h_j - weight_decay * theta[j]
                share = eta * weight_decay if decoupled else 0.0
                theta[j] = moved(theta[j], eta * h_j / (np.sqrt(G_hat) + eps), raw, share)
        history.append(snapshot(theta))
    return history
