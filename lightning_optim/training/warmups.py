"""Warm-ups that need no tuning: factors on the learning rate of step t = 1, 2, ... from the optimizer's own beta2.

RAdam's rectification (Liu et al. 2019, arXiv:1908.03265, equation 4) and the two simpler rules of Ma & Yarats 2019
(arXiv:1910.04209, section 5). All three reach 1 after a few times 1 / (1 - beta2) steps.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable

from lightning_optim.language.rectification import rectification

THRESHOLD = 4.0  # length of the moving average above which r_t exists


def untuned_linear(t: int, beta2: float) -> float:
    """min(1, t (1 - beta2) / 2): a straight line over 2 / (1 - beta2) steps.

    Example:
        >>> untuned_linear(1, 0.99), untuned_linear(500, 0.99)
        (0.005..., 1.0)
    """
    return min(1.0, t * (1 - beta2) / 2)


def untuned_exponential(t: int, beta2: float) -> float:
    """1 - exp(-(1 - beta2) t).

    Example:
        >>> round(untuned_exponential(100, 0.99), 2)
        0.63
    """
    return -math.expm1(-(1 - beta2) * t)


def rectified(t: int, beta2: float) -> float:
    """RAdam's r_t, shifted in time so that step 1 is the first at which it exists.

    For usual values of beta2 that is step 5 of RAdam. RAdam's steps before that are not rectified, which a factor
    cannot express.
    """
    return rectification(beta2, t + _first_rectified(beta2) - 1, THRESHOLD)[1]


def can_rectify(beta2: float) -> bool:
    """Whether r_t exists at some step: the moving average must get longer than the threshold, so beta2 > 0.6."""
    return 2 / (1 - beta2) - 1 > THRESHOLD


@functools.cache
def _first_rectified(beta2: float) -> int:
    t = 1
    while not rectification(beta2, t, THRESHOLD)[0]:
        t += 1
    return t


WARMUPS: dict[str, Callable[[int, float], float]] = {
    "linear": untuned_linear,
    "exponential": untuned_exponential,
    "rectified": rectified,
}


def length(warmup: str, beta2: float) -> int:
    """The number of steps of a warm-up, after which its factor is 1, or 0.99 where it only approaches 1.

    Example:
        >>> length("linear", 0.999), length("exponential", 0.99)
        (2000, 461)
    """
    reached = 1 - 1e-6 if warmup == "linear" else 0.99

    def is_over(t: int) -> bool:
        return t > 0 and WARMUPS[warmup](t, beta2) >= reached

    last = 1
    while not is_over(last):
        last *= 2
    return bisect.bisect_left(range(last), True, key=is_over)
