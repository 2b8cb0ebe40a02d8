"""What differences over seeds say: paired differences, their interval, p-values, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_optim.race import student

LEVEL = 0.05  # a corrected p-value below it is a difference
CONFIDENCE = 1 - LEVEL


@dataclass(frozen=True)
class Difference:
    """A candidate less another, over the seeds that both have finished.

    Attributes:
        seeds: Number of pairs.
        mean: Mean of the differences.
        low: Lower end of the 95 % confidence interval of the mean; None for one pair, or where all are equal.
        high: Upper end of it.
        p: The p-value of the paired t-test, two-sided; None where there is no interval.
    """

    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """The differences of two candidates, seed by seed; None where they share no seed.

    One pair has no spread, and differences that are all the same have none: there is no test, unless they are all 0.

    Args:
        values: The metric of a candidate by seed.
        others: That of the other.

    Example:
        >>> found = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.5, 1: 1.0, 2: 1.5})
        >>> found.mean, round(found.low, 3), round(found.high, 3), round(found.p, 3)
        (1.0, -0.242, 2.242, 0.074)
    """
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    if not differences:
        return None
    mean, count = statistics.fmean(differences), len(differences)
    error = spread(differences) / math.sqrt(count)
    if not any(differences):
        return Difference(count, 0.0, 0.0, 0.0, 1.0) if count > 1 else Difference(count, 0.0)
    if count < 2 or error <= 1e-12 * abs(mean):
        return Difference(count, mean)
    margin = student.quantile(CONFIDENCE, count - 1) * error
    return Difference(count, mean, mean - margin, mean + margin, student.two_sided(mean / error, count - 1))


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values that hold for all comparisons together (Holm 1979); None stays None and does not count.

    Example:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[i] = least
    return corrected
