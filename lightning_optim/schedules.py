"""Factors on the learning rate, as pure functions of the progress of training in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, float], float]


def constant(progress: float, final: float) -> float:
    return 1.0


def linear(progress: float, final: float) -> float:
    """From 1 to `final` in a straight line."""
    return 1 + (final - 1) * progress


def cosine(progress: float, final: float) -> float:
    """From 1 to `final` along half a cosine.  Loshchilov & Hutter 2017, arXiv:1608.03983."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}


def factor(schedule: Schedule, step: int, total: float, warmup: int, final: float) -> float:
    """The factor for the step that follows `step` steps: linear warmup, then the schedule over what is left.

    Example:
        >>> [round(factor(linear, t, 4, 0, 0.0), 2) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> factor(cosine, 1, 100, 4, 0.0)
        0.5
    """
    if step < warmup:
        return (step + 1) / warmup
    return schedule(min((step - warmup) / max(total - warmup, 1), 1.0), final)
