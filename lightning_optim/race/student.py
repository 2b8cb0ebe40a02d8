"""Student's t distribution with a whole number of degrees of freedom, in closed form.

Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
"""

from __future__ import annotations

import math

MOST = 1e12  # beyond it the quantile of a level is infinite to all who read it


def within(t: float, freedom: int) -> float:
    """The probability that |T| is at most `t`.

    Args:
        t: At least 0.
        freedom: Degrees of freedom, at least 1.

    Example:
        >>> round(within(4.302652729696142, 2), 9)
        0.95
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total = 0.0
    for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return min(1.0, 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total)


def two_sided(t: float, freedom: int) -> float:
    """The probability that |T| exceeds |t|: the p-value of a two-sided test.

    Example:
        >>> round(two_sided(-12.706204736, 1), 9)
        0.05
    """
    return max(0.0, 1 - within(abs(t), freedom))


def quantile(level: float, freedom: int) -> float:
    """The `t` of which |T| is within it with probability `level`, by bisection.

    Example:
        >>> round(quantile(0.95, 4), 6)
        2.776445
    """
    low, high = 0.0, 1.0
    while within(high, freedom) < level and high < MOST:
        low, high = high, 2 * high
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if within(middle, freedom) < level else (low, middle)
    return high
