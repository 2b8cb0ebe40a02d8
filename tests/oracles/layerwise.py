"""LARS (You et al. 2017, arXiv 1708.03888) and LAMB (You et al. 2019, arXiv 1904.00962): trust ratios."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, decays, global_norm, kept, moved, norm, run_per_tensor


def is_adapted(theta: Array, only_vectors: bool, adapt: bool, always_adapt: bool) -> bool:
    """Vectors and scalars have no trust ratio, unless asked for or unless there is nothing else."""
    return adapt and (always_adapt or theta.ndim > 1 or only_vectors)


def lars(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    nesterov: bool = False,
    adapt: bool = True,
    always_adapt: bool = False,
    lr_inside_buffer: bool = True,
    trust_clip: bool = False,
    maximize: bool = False,
) -> History:
    """r = kappa |theta| / (|g| + lambda |theta| + eps) scales each tensor's gradient."""
    only_vectors = all(np.ndim(p) <= 1 for p in params)

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        r = 1.0
        if is_adapted(theta, only_vectors, adapt, always_adapt):
            if norm(theta) > 0 and norm(g) > 0:
                r = trust_coefficient * norm(theta) / (norm(g) + weight_decay * norm(theta) + eps)
            if trust_clip:
                r = min(r / eta, 1.0) if eta > 0 else 1.0
        h = r * (g + weight_decay * theta)
        if lr_inside_buffer:
            s["b"] = momentum * s["b"] + eta * h
            return moved(theta, momentum * s["b"] + eta * h if nesterov else s["b"], g)
        s["b"] = momentum * s["b"] + h
        return moved(theta, eta * (momentum * s["b"] + h if nesterov else s["b"]), g)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("b",))


def lamb(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    max_grad_norm: float | None = None,
    phi: tuple[float, float] | None = None,
    adapt: bool = True,
    always_adapt: bool = False,
    maximize: bool = False,
) -> History:
    """u = Adam's direction + lambda theta; theta - eta phi(|theta|) / |u| u."""
    beta1, beta2 = betas
    only_vectors = all(np.ndim(p) <= 1 for p in params)

    def clip(g: Sequence[Array | None], limit: float) -> list[Array | None]:
        factor = max(1.0, global_norm(g) / limit)
        return [None if x is None else x / factor for x in g]

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        c1 = 1 - beta1**t if bias_correction else 1.0
        c2 = 1 - beta2**t if bias_correction else 1.0
        direction = (s["m"] / c1) / (np.sqrt(s["v"] / c2) + eps)
        u = kept(direction, g) + weight_decay * decays(theta, direction) * theta
        r = 1.0
        if is_adapted(theta, only_vectors, adapt, always_adapt):
            weight_norm = norm(theta)
            if phi is not None:
                weight_norm = min(max(weight_norm, phi[0]), phi[1])
            if weight_norm > 0 and norm(u) > 0:
                r = weight_norm / norm(u)
        return theta - eta * r * u

    if max_grad_norm is not None:
        gradients = [clip(g, max_grad_norm) for g in gradients]
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "v"))
