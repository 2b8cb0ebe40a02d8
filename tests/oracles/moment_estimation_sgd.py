"""SGD with online moment estimation (Zhang et al. 2022, PMLR 162, reconstruction): a delayed norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .driver import Array, Gradients, History, Params, moved, snapshot, start, steps


def moment_estimation_sgd(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-2,
    beta: float = 0.99,
    offset: float = 1e-8,
    init: Literal["first"] | float = "first",
    delayed: bool = True,
    weight_decay: float = 0.0,
    scope: Literal["global", "tensor"] = "global",
    maximize: bool = False,
) -> History:
    """theta - c g / (sqrt(G) + m), then G <- EMA(sum of g^2 over the scope; beta).

    A step in which no tensor of the scope has a gradient leaves G and its counter alone.
    """
    theta = start(params)
    everything = list(range(len(theta)))
    scopes = [everything] if scope == "global" else [[j] for j in everything]
    G = [0.0 if init == "first" else float(init) for _ in scopes]
    t = [0 for _ in scopes]
    history: History = []
    for c, g in steps(gradients, lr, lrs, maximize):
        for i, members in enumerate(scopes):
            present: dict[int, Array] = {}
            for j in members:
                g_j = g[j]
                if g_j is not None:
                    present[j] = g_j
            if not present:
                continue
            t[i] += 1
            N = sum(float(np.sum(g_j**2)) for g_j in present.values())
            if t[i] == 1 and init == "first":
                G[i] = N
            before = not delayed and t[i] > 1
            if before:
                G[i] = beta * G[i] + (1 - beta) * N
            for j, g_j in present.items():
                theta[j] = moved(theta[j], c * g_j / (np.sqrt(G[i]) + offset), g_j, c * weight_decay)
            if not before:
                G[i] = beta * G[i] + (1 - beta) * N
        history.append(snapshot(theta))
    return history
