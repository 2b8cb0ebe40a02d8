"""What the pictures of a race show: mean curves with a band over seeds, and the metric over learning rates."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_optim.race.comparison import Comparison
from lightning_optim.race.metric import TRAINING_LOSS
from lightning_optim.race.outcome import Curve
from lightning_optim.race.summary import Standing

SMOOTH = 0.04  # the share of points over which a training loss is averaged to both sides
TOO_FAR = 10.0  # times the median of the highest values of candidates
FAR = 10.0  # from this ratio of largest to smallest on, an axis is logarithmic


@dataclass(frozen=True)
class Series:
    """A line with a band.

    Attributes:
        index: Of the candidate.
        xs: Where.
        ys: The means.
        low: The lowest over seeds.
        high: The highest over seeds.
    """

    index: int
    xs: list[float]
    ys: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: What it shows.
        x_label: Below.
        series: Its lines.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is.
        marks: Whether points are marked.
        top: Values above it are shown there, so that one candidate far above leaves room for the others.
    """

    title: str
    x_label: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    marks: bool = False
    top: float = math.inf


def charts(comparison: Comparison) -> list[Chart]:
    """The metric and the training loss over steps, and the metric over learning rates; those that have points."""
    name = comparison.metric.name
    found = []
    for curve in dict.fromkeys((name, *comparison.others(), TRAINING_LOSS)):
        series = [_over_seeds(i, one, curve) for i, one in enumerate(comparison.standings)]
        found.append(_chart(f"{curve} at the best learning rate", "step", [one for one in series if one]))
    rates = [_over_rates(i, one) for i, one in enumerate(comparison.standings)]
    found.append(_chart(f"{name} at the end", "learning rate", [one for one in rates if one], rates=True))
    return [chart for chart in found if any(len(one.xs) > 1 for one in chart.series)]


def _chart(title: str, x_label: str, series: list[Series], rates: bool = False) -> Chart:
    top = TOO_FAR * statistics.median([max(one.high) for one in series]) if series else math.inf
    if top <= 0:
        top = math.inf
    values = [min(y, top) for one in series for y in (*one.low, *one.high)]
    log_y = bool(values) and min(values) > 0 and max(values) / min(values) > FAR
    return Chart(title, x_label, series, log_x=rates, log_y=log_y, marks=rates or _few(series), top=top)


def _few(series: Sequence[Series]) -> bool:
    return max((len(one.xs) for one in series), default=0) <= 12


def _over_seeds(index: int, one: Standing, name: str) -> Series | None:
    found = [o.curves[name] for o in one.outcomes.values() if o.status == "finished" and name in o.curves]
    if not found:
        return None
    if name == TRAINING_LOSS:
        found = [smoothed(curve) for curve in found]
    first = max(curve[0][0] for curve in found)
    last = min(curve[0][-1] for curve in found)
    xs = sorted({x for steps, _ in found for x in steps if first <= x <= last})
    if not xs:
        return None
    return _series(index, xs, [[at(curve, x) for curve in found] for x in xs])


def _over_rates(index: int, one: Standing) -> Series | None:
    points = [point for point in one.points if point.values and not point.failures]
    return _series(index, [p.lr for p in points], [list(p.values.values()) for p in points]) if points else None


def _series(index: int, xs: list[float], values: list[list[float]]) -> Series:
    means = [math.fsum(some) / len(some) for some in values]
    return Series(index, xs, means, [min(some) for some in values], [max(some) for some in values])


def at(curve: Curve, x: float) -> float:
    """The value of a curve, between two of its points on the line between them.

    Example:
        >>> at(([1, 3], [5.0, 9.0]), 2)
        7.0
    """
    steps, values = curve
    i = min(max(bisect.bisect_left(steps, x), 1), len(steps) - 1)
    if len(steps) == 1 or steps[i] == steps[i - 1]:
        return values[i]
    share = (x - steps[i - 1]) / (steps[i] - steps[i - 1])
    return values[i - 1] + min(max(share, 0.0), 1.0) * (values[i] - values[i - 1])


def smoothed(curve: Curve) -> Curve:
    """A curve as means of neighbours.

    Example:
        >>> smoothed(([1, 2, 3], [1.0, 2.0, 6.0]))  # too short
        ([1, 2, 3], [1.0, 2.0, 6.0])
    """
    steps, values = curve
    reach = int(SMOOTH * len(values))
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return steps, [math.fsum(window) / len(window) for window in windows]
