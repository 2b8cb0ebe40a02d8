"""Schedule-Free AdamW, SGD and RAdam: Defazio et al. 2024, arXiv 2405.15682, with x, y and z in memory.

The average x is stored here, and y is computed from x and z. `averages` returns x after each step instead of y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, run_per_tensor

Rate = Callable[[int, float], float]
Direction = Callable[[Array, Slots, int], Array]


def _run(
    params: Params,
    gradients: Gradients,
    rate: Rate,
    direction: Direction,
    *,
    lr: float,
    lrs: Sequence[float] | None,
    beta: float,
    weight_decay: float,
    r: float,
    power: float,
    maximize: bool,
    averages: bool,
) -> History:
    found: list[list[Slots]] = [[{}] for _ in params]  # the slots of each tensor, to look at x

    def one(j: int) -> Callable[[Array, Array, Slots, int, float], Array]:
        def step(y: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
            found[j][0] = s
            if t == 1:
                s["z"], s["x"] = y.copy(), y.copy()
                s["weights"], s["largest"] = np.array(0.0), np.array(-1.0)
            gamma = rate(t, eta)
            s["largest"] = np.maximum(s["largest"], gamma)
            w = t**r * float(s["largest"]) ** power
            s["weights"] = s["weights"] + w
            c = w / float(s["weights"]) if s["weights"] != 0 else 0.0
            d = direction(g, s, t) + weight_decay * y
            s["z"] = s["z"] - gamma * d
            s["x"] = (1 - c) * s["x"] + c * s["z"]
            return np.asarray(beta * s["x"] + (1 - beta) * s["z"])

        return step

    histories = [
        run_per_tensor(one(j), [p], [[g[j]] for g in gradients], lr=lr, lrs=lrs, maximize=maximize, zeros=("v",))
        for j, p in enumerate(params)
    ]
    if averages:
        ends = [found[j][0].get("x", params[j]) for j in range(len(params))]
        return [[np.asarray(x) for x in ends]]
    return [[history[k][0] for history in histories] for k in range(len(gradients))]


def schedule_free_adamw(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    maximize: bool = False,
    averages: bool = False,
) -> History:
    """The direction is g over the root of the second moment; with `averages` only x after the last step."""

    def direction(g: Array, s: Slots, t: int) -> Array:
        s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g**2
        return g / (np.sqrt(s["v"] / (1 - betas[1] ** t)) + eps)

    return _run(
        params,
        gradients,
        lambda t, eta: eta * min(1.0, t / warmup_steps) if warmup_steps else eta,
        direction,
        lr=lr,
        lrs=lrs,
        beta=betas[0],
        weight_decay=weight_decay,
        r=r,
        power=weight_lr_power,
        maximize=maximize,
        averages=averages,
    )


def schedule_free_sgd(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    maximize: bool = False,
    averages: bool = False,
) -> History:
    """The direction is g; with `averages` only x after the last step."""
    return _run(
        params,
        gradients,
        lambda t, eta: eta * min(1.0, t / warmup_steps) if warmup_steps else eta,
        lambda g, s, t: g,
        lr=lr,
        lrs=lrs,
        beta=momentum,
        weight_decay=weight_decay,
        r=r,
        power=weight_lr_power,
        maximize=maximize,
        averages=averages,
    )


def schedule_free_radam(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    silent_sgd_phase: bool = True,
    maximize: bool = False,
    averages: bool = False,
) -> History:
    """The rate is rectified; before that it is 0, or that of SGD. With `averages` only x after the last step."""
    infinite = 2 / (1 - betas[1]) - 1

    def length(t: int) -> float:
        return infinite - 2 * t * betas[1] ** t / (1 - betas[1] ** t)

    def rate(t: int, eta: float) -> float:
        rho = length(t)
        if rho <= 4:
            return 0.0 if silent_sgd_phase else eta
        return eta * math.sqrt((rho - 4) * (rho - 2) * infinite / ((infinite - 4) * (infinite - 2) * rho))

    def direction(g: Array, s: Slots, t: int) -> Array:
        s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g**2
        return g / (np.sqrt(s["v"] / (1 - betas[1] ** t)) + eps) if length(t) > 4 else g

    return _run(
        params,
        gradients,
        rate,
        direction,
        lr=lr,
        lrs=lrs,
        beta=betas[0],
        weight_decay=weight_decay,
        r=r,
        power=weight_lr_power,
        maximize=maximize,
        averages=averages,
    )
