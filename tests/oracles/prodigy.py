"""Prodigy: Mishchenko & Defazio 2023, arXiv 2306.06101, as the authors' program; d belongs to all tensors together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Gradients, History, Params, moved, snapshot, start, steps


def prodigy(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = float("inf"),
    maximize: bool = False,
    ds: list[float] | None = None,
) -> History:
    """Two sums over all tensors with a gradient estimate d; the old one makes the step, the new one scales eps.

    `ds` receives d after each step.
    """
    beta1, beta2 = betas
    decay = beta2**0.5 if beta3 is None else beta3
    theta, first = start(params), start(params)
    m, v, s = ([np.zeros_like(x) for x in theta] for _ in range(3))
    t = [0 for _ in theta]
    d = d_max = d0
    numerator = 0.0
    history: History = []
    for eta, g in steps(gradients, lr, lrs, maximize):
        here = [j for j, g_j in enumerate(g) if g_j is not None]
        new_numerator, denominator = decay * numerator, 0.0
        a = [0.0 for _ in theta]
        for j in here:
            t[j] += 1
            g_j = np.asarray(g[j])
            if not decoupled:
                g_j = g_j + weight_decay * theta[j]
            a[j] = d * eta
            if use_bias_correction:
                a[j] *= (1 - beta2 ** t[j]) ** 0.5 / (1 - beta1 ** t[j])
            new_numerator += d / d0 * a[j] * float(np.sum(g_j * (first[j] - theta[j])))
            m[j] = beta1 * m[j] + (1 - beta1) * d * g_j
            v[j] = beta2 * v[j] + (1 - beta2) * d**2 * g_j**2
            weight = a[j] if not safeguard_warmup else d if eta > 0 else 0.0
            s[j] = decay * s[j] + d / d0 * weight * g_j
            denominator += float(np.sum(np.abs(s[j])))
        if denominator > 0:
            numerator = new_numerator
            estimate = d_coef * numerator / denominator
            if d == d0:
                d = max(d, estimate)
            d_max = max(d_max, estimate)
            d = min(d_max, d * growth_rate)
        for j in here:
            share = weight_decay * a[j] if decoupled else 0.0
            theta[j] = moved(theta[j], a[j] * m[j] / (np.sqrt(v[j]) + d * eps), np.asarray(g[j]), share)
        history.append(snapshot(theta))
        if ds is not None:
            ds.append(d)
    return history
