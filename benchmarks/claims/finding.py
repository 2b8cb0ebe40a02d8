"""What an experiment has seen: a difference over seeds, or that two sides are alike, with a verdict by a fixed rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_optim.race.statistics import CONFIDENCE, LEVEL, Difference, holm, paired, spread
from lightning_optim.race.student import two_sided

SEEN, NOT_SEEN, OPPOSITE = "seen", "not seen at this size", "the opposite"
Values = Mapping[int, float]  # by seed
QUANTILES = 4000


@dataclass(frozen=True)
class Finding:
    """One statement of a claim, and what the runs say of it.

    Attributes:
        statement: What should be seen if the claim holds.
        saw: The effect with its interval, in words.
        verdict: "seen", "not seen at this size" or "the opposite".
        p: The p-value; `corrected` corrects it for the findings of a claim.
        size: The mean in standard deviations over seeds, with its 95 % confidence interval; None without a spread.
    """

    statement: str
    saw: str
    verdict: str
    p: float
    size: tuple[float, float, float] | None


def lower(
    statement: str, values: Values, others: Values, unit: str = "", *, names: tuple[str, str], ratio: bool = False
) -> Finding:
    """The first side's values should be lower than the other's, seed by seed: a two-sided paired t-test.

    Args:
        statement: What should be seen.
        values: Of the side that the claim is for, by seed.
        others: Of the other side.
        unit: What values are measured in.
        names: How both sides are called in what was seen.
        ratio: Compare logarithms of values, all above 0, and tell the ratio.

    Raises:
        ValueError: if the sides share less than two seeds.

    Example:
        >>> values, others = {0: 1.0, 1: 1.1, 2: 1.2}, {0: 2.0, 1: 2.2, 2: 2.1}
        >>> found = lower("Adan loses less.", values, others, "nats", names=("adan", "adamw"))
        >>> found.verdict, found.saw
        ('seen', 'adan 1.1, adamw 2.1 nats: -1 (-1.25 to -0.752)')
    """
    return _differ(statement, values, others, -1, unit, names, ratio)


def higher(
    statement: str, values: Values, others: Values, unit: str = "", *, names: tuple[str, str], ratio: bool = False
) -> Finding:
    """The first side's values should be higher than the other's; else as `lower`."""
    return _differ(statement, values, others, 1, unit, names, ratio)


def alike(
    statement: str, values: Values, others: Values | float, margin: float, unit: str = "", *, names: tuple[str, str]
) -> Finding:
    """Both sides should be the same but for a margin: two one-sided paired t-tests (Schuirmann 1987).

    It is the opposite where the one-sided test says that the difference is larger than the margin.

    Args:
        statement: What should be seen.
        values: Of one side by seed.
        others: Of the other side; or one number, as a formula gives it.
        margin: The largest difference that does not matter, in the unit of the values; chosen before the runs.
        unit: What values are measured in.
        names: How both sides are called in what was seen.

    Raises:
        ValueError: if the sides share less than two seeds.
    """
    pairs = _pairs(values, others if isinstance(others, Mapping) else dict.fromkeys(values, float(others)))
    differences = [a - b for a, b in pairs]
    mean, error = sum(differences) / len(pairs), spread(differences) / math.sqrt(len(pairs))
    distance = abs(margin - abs(mean))
    p = two_sided(distance / error, len(pairs) - 1) / 2 if error else 0.0
    verdict = NOT_SEEN if p >= LEVEL else SEEN if abs(mean) <= margin else OPPOSITE
    saw = f"{_told(pairs, _difference(pairs), unit, names)}; alike is within {margin:.3g}"
    return Finding(statement, saw, verdict, p, effect_size(differences))


def corrected(findings: Sequence[Finding]) -> list[Finding]:
    """The findings of a claim with p-values that hold for all of them together, by Holm's method."""
    found = []
    for one, p in zip(findings, holm([one.p for one in findings]), strict=True):
        assert p is not None
        found.append(replace(one, p=p, verdict=one.verdict if p < LEVEL else NOT_SEEN))
    return found


def effect_size(differences: Sequence[float]) -> tuple[float, float, float] | None:
    """The mean of paired differences in their standard deviations, with its 95 % confidence interval.

    The interval holds the effects under which t is neither in the lower nor in the upper 2.5 % of its distribution,
    noncentral t (Cumming and Finch 2001): that of (z + effect √n) / s, with z normal and s² a mean of n - 1 squares.

    Example:
        >>> [round(x, 2) for x in effect_size([1.0, 2.0, 3.0, 4.0, 5.0])]
        [1.9, 0.33, 3.41]
    """
    import numpy
    from scipy.optimize import bisect
    from scipy.stats import chi2, norm

    count, deviation = len(differences), spread(differences)
    mean = sum(differences) / count
    if count < 2 or deviation <= 1e-12 * abs(mean):
        return None
    t = mean / deviation * math.sqrt(count)
    # scipy.stats.nct is NaN in the tails that matter here; a mean over quantiles of s is not
    scales = numpy.sqrt(chi2.ppf((numpy.arange(QUANTILES) + 0.5) / QUANTILES, count - 1) / (count - 1))
    lowest, highest = min(t * scales[0], t * scales[-1]) - 10, max(t * scales[0], t * scales[-1]) + 10

    def end(level: float) -> float:
        shift: Any = bisect(lambda at: norm.cdf(t * scales - at).mean() - level, lowest, highest)
        return float(shift) / math.sqrt(count)

    tail = (1 - CONFIDENCE) / 2
    return mean / deviation, end(1 - tail), end(tail)


def _differ(
    statement: str, values: Values, others: Values, sign: int, unit: str, names: tuple[str, str], ratio: bool
) -> Finding:
    pairs = _pairs(values, others)
    compared = [(math.log(a), math.log(b)) for a, b in pairs] if ratio else pairs
    found = _difference(compared)
    p = found.p if found.p is not None else 0.0  # the same difference, not 0, for all seeds
    verdict = NOT_SEEN if p >= LEVEL else SEEN if sign * found.mean > 0 else OPPOSITE
    saw = _told(pairs, found, unit, names, ratio)
    return Finding(statement, saw, verdict, p, effect_size([a - b for a, b in compared]))


def _pairs(values: Values, others: Values) -> list[tuple[float, float]]:
    pairs = [(values[seed], others[seed]) for seed in values if seed in others]
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} seeds are shared, and a test takes two")
    return pairs


def _difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    found = paired(dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs)))
    assert found is not None
    return found


def _told(
    pairs: Sequence[tuple[float, float]], found: Difference, unit: str, names: tuple[str, str], ratio: bool = False
) -> str:
    """Both means, and the difference with its interval; of logarithms, told as a ratio."""
    means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
    both = f"{names[0]} {means[0]:.3g}, {names[1]} {means[1]:.3g}{f' {unit}' if unit else ''}"
    ends = [] if found.low is None or found.high is None else [found.low, found.high]
    interval = " to ".join(f"{math.exp(end) if ratio else end:.3g}" for end in ends)
    by = f"{math.exp(found.mean):.3g} times" if ratio else f"{found.mean:+.3g}"
    return f"{both}: {by}{f' ({interval})' if interval else ''}"
