"""Adafactor: Shazeer & Stern 2018, arXiv 1804.04235, as in the paper and as in `torch.optim`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, norm, run_per_tensor

FactorAxes = Literal["last_two", "two_largest"]


def rms(x: Array) -> float:
    """Root mean square of one whole tensor."""
    return norm(x) / math.sqrt(x.size)


def factored_axes(shape: tuple[int, ...], factor_axes: FactorAxes, smallest: int) -> tuple[int, int] | None:
    """The axes (a, b) of the row and the column moment, or None; of equal axes the later one is larger."""
    if len(shape) < 2:
        return None
    a, b = len(shape) - 2, len(shape) - 1
    if factor_axes == "two_largest":
        by_size = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
        a, b = sorted(by_size[-2:])
    return (a, b) if min(shape[a], shape[b]) >= smallest else None


def adafactor(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    mode: Literal["torch", "paper"] = "torch",
    relative_step: bool = True,
    scale_parameter: bool = True,
    warmup_init: bool = False,
    beta1: float | None = None,
    factored: bool = True,
    factor_axes: FactorAxes = "last_two",
    min_dim_size_to_factor: int = 0,
    maximize: bool = False,
) -> History:
    """g / sqrt(row x column second moment), clipped to RMS d, times the RMS of theta.

    Mode "torch" ignores `relative_step`, `scale_parameter`, `warmup_init` and `beta1`.
    """
    eps1, eps2 = eps
    if eps1 is None:
        eps1 = float(np.finfo(np.float64).eps) if mode == "torch" else 1e-30

    def second_moment(g2: Array, s: Slots, t: int, floor: float) -> Array:
        """Average g2 (whole or its row and column means) and return the estimate of its full shape."""
        beta2 = 1 - t**beta2_decay
        axes = factored_axes(g2.shape, factor_axes, min_dim_size_to_factor) if factored else None
        if axes is None:
            s["V"] = beta2 * s.get("V", np.zeros_like(g2)) + (1 - beta2) * g2
            return s["V"]
        a, b = axes
        row = g2.mean(axis=b, keepdims=True)
        column = g2.mean(axis=a, keepdims=True)
        s["R"] = beta2 * s.get("R", np.zeros_like(row)) + (1 - beta2) * row
        s["C"] = beta2 * s.get("C", np.zeros_like(column)) + (1 - beta2) * column
        return np.asarray(s["R"] * s["C"] / np.maximum(s["R"].mean(axis=a, keepdims=True), floor))

    def torch_step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        alpha = max(eps2, rms(theta)) * min(eta, 1 / math.sqrt(t))
        V = np.maximum(second_moment(g**2, s, t, floor=eps1), eps1**2)
        U = g / np.sqrt(V)
        return moved(theta, alpha * U / max(1.0, rms(U) / d), g, eta * weight_decay)

    def paper_step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        rho = eta
        if relative_step:
            rho = min(1e-6 * t if warmup_init else eta, 1 / math.sqrt(t))
        alpha = max(eps2, rms(theta)) * rho if scale_parameter else rho
        V = second_moment(g**2 + eps1, s, t, floor=0.0)
        U = g / np.sqrt(V)
        U = alpha * U / max(1.0, rms(U) / d)
        if beta1 is not None:
            s["M"] = beta1 * s.get("M", np.zeros_like(U)) + (1 - beta1) * U
            U = s["M"]
        return moved(theta, U, g, weight_decay * alpha)

    step = torch_step if mode == "torch" else paper_step
    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize)
