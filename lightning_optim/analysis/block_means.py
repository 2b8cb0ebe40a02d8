"""Has the law of a time series changed? Tests on means over blocks of steps, whose correlation is taken into account.

Values of one run at neighbouring steps are nearly the same value. A test that takes them for independent ones always
finds a change. Means over blocks are far less correlated, and what correlation remains is estimated and corrected for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.005  # probability to find a change where there is none, over all series and tests together
LEAST_CHANGE = 0.1  # of a series' standard deviation: a smaller drift over two windows is no other law
LEAST_GROWTH = 1.3  # of a variance, likewise
UNIT_ROOT = 20.5  # 99 % of random walks have K (1 - rho) below this: Dickey & Fuller 1979, with a constant


@dataclass(frozen=True)
class Window:
    """Consecutive steps of training, as means over blocks of equal numbers of steps. All float64.

    Attributes:
        means: The mean of each series over each block, (blocks, series).
        squares: The mean of its square, (blocks, series).
        points: Its value at one step of each block, (blocks, series).
        movement: The mean squared length of a step in each block, (blocks,).
        shrinking: Which part of the steps was shorter than the step before.
        displacement: The distance between the weights at the beginning and at the end.
        path: The sum of the lengths of all steps, or an estimate of it.
        size: The norm of the weights at the end.
    """

    means: Tensor
    squares: Tensor
    points: Tensor
    movement: Tensor
    shrinking: float
    displacement: float
    path: float
    size: float

    @property
    def step(self) -> float:
        """The root of the mean squared length of a step."""
        return math.sqrt(float(self.movement.mean()))


def merged(windows: Sequence[Window]) -> Window:
    """Consecutive windows of equal length as one, with as many blocks as each of them has.

    The displacement, the path and the size are those of the last.
    """
    last, k = windows[-1], len(windows)

    def longer(name: str) -> Tensor:
        every = torch.cat([getattr(window, name) for window in windows])
        return every.view(-1, k, *every.shape[1:]).mean(1)

    points = torch.cat([window.points for window in windows])
    longer_blocks = torch.arange(len(last.points), dtype=torch.int64, device="cpu")
    return Window(
        means=longer("means"),
        squares=longer("squares"),
        points=points[within_block(len(last.points), k) + k * longer_blocks],
        movement=longer("movement"),
        shrinking=sum(window.shrinking for window in windows) / k,
        displacement=last.displacement,
        path=last.path,
        size=last.size,
    )


@dataclass(frozen=True)
class Change:
    """What was found in one series over two windows.

    Attributes:
        series: Its number.
        what: "mean", "variance" or "distribution".
        size: The change, in standard deviations of the series, as a ratio of variances, or as the distance of
            Kolmogorov and Smirnov.
        p: The probability of such a change where there is none, for one test.
    """

    series: int
    what: str
    size: float
    p: float


def within_block(blocks: int, size: int) -> Tensor:
    """A step within each block, (blocks,), such that no cycle has the rhythm of all of them.

    Example:
        >>> within_block(5, 10)
        tensor([0, 6, 2, 8, 4])
    """
    golden = (math.sqrt(5) - 1) / 2
    return (torch.arange(blocks, dtype=torch.float64, device="cpu") * golden % 1 * size).long()


def changes(previous: Window, last: Window) -> tuple[list[Change], int]:
    """The series whose law differs between two windows, and the number of series that wander like a random walk.

    Means: a linear trend over the blocks of both windows, with a standard error from the scatter around it, corrected
    for first-order autocorrelation. Variances: the same for the squared distance from the mean. Distributions: the
    two-sample test of Kolmogorov and Smirnov, on values thinned by their autocorrelation. The level is divided by the
    number of tests (Bonferroni). A series wanders if a unit root is not rejected at 1 %: then nothing shows yet that
    it stays where it is, trends mean nothing, and it is only tested for a drift of its steps.
    """
    both = torch.cat([previous.means, last.means])
    squares = torch.cat([previous.squares, last.squares])
    center = both.mean(0)
    spread = squares - 2 * center * both + center**2  # mean squared distance from the center in each block
    variance = spread.mean(0).clamp_min(0)
    live = variance > 1e-24 * (center**2 + variance)
    found, wandering = [], 0
    tests = 3 * max(1, int(live.sum()))
    for i in torch.nonzero(live)[:, 0].tolist():
        sd = math.sqrt(float(variance[i]))
        if float(both[:, i].std(correction=0)) < 0.05 * sd:
            shift, p = 0.0, 1.0  # blocks are longer than anything that happens in it, such as a cycle
        elif wanders(both[:, i]):
            wandering += 1
            step, p = drift(both[:, i])
            if p < LEVEL / tests:
                found.append(Change(i, "mean", step * len(both) / sd, p))
            continue  # the other tests are for series that return
        else:
            slope, p = trend(both[:, i])
            shift = slope * len(both) / sd
        own = torch.cat([_around_mean(window, i) for window in (previous, last)])
        ratio = float(own[len(previous.means) :].mean() / own[: len(previous.means)].mean().clamp_min(1e-300))
        of_variance = trend(own.clamp_min(1e-300).log())[1] if own.std() > 0.05 * own.mean() else 1.0
        distance, of_law = smirnov(previous.points[:, i], last.points[:, i])
        candidates = (
            Change(i, "mean", shift, p if abs(shift) > LEAST_CHANGE else 1.0),
            Change(i, "variance", ratio, of_variance if max(ratio, 1 / max(ratio, 1e-300)) > LEAST_GROWTH else 1.0),
            Change(i, "distribution", distance, of_law),
        )
        found += [change for change in candidates if change.p < LEVEL / tests]
    return found, wandering


def _around_mean(window: Window, i: int) -> Tensor:
    """The mean squared distance from the mean of the window, in each block."""
    center = window.means[:, i].mean()
    return (window.squares[:, i] - 2 * center * window.means[:, i] + center**2).clamp_min(0)


def trend(y: Tensor) -> tuple[float, float]:
    """The least-squares slope of a series per block, and the probability of one as large where there is none.

    Example:
        >>> slope, p = trend(torch.arange(10.0, dtype=torch.float64))
        >>> slope, p
        (1.0, 0.0)
    """
    slope, error, left = slope_of(y)
    if error <= 1e-12 * abs(slope):
        return slope, 0.0 if slope else 1.0
    return slope, two_sided(slope / error, left)


def wanders(y: Tensor) -> bool:
    """Whether a series may be a random walk."""
    return len(y) * (1 - autocorrelation(y)) < UNIT_ROOT


def drift(y: Tensor) -> tuple[float, float]:
    """The mean step of a random walk, and the probability of one as large where there is no drift.

    Example:
        >>> drift(torch.arange(10.0, dtype=torch.float64))
        (1.0, 0.0)
    """
    steps = y.diff()
    mean, error = float(steps.mean()), float(steps.std()) / math.sqrt(len(steps))
    if error <= 1e-9 * abs(mean):
        return mean, 0.0 if mean else 1.0
    return mean, two_sided(mean / error, len(steps) - 1.0)


def slope_of(y: Tensor) -> tuple[float, float, float]:
    """The least-squares slope of a series, its standard error, and the degrees of freedom of that error."""
    n = len(y)
    t = torch.arange(n, dtype=torch.float64, device=y.device) - (n - 1) / 2
    over = (t * t).sum()
    slope = (t * y).sum() / over
    rest = y - y.mean() - slope * t
    rho = autocorrelation(rest)
    rho = min(max(rho + (2 + 4 * rho) / n, 0.0), 0.95)  # without the bias of a detrended series (Kendall 1954)
    left = max(n * (1 - rho) / (1 + rho) - 2, 2.0)
    error = math.sqrt(float((rest * rest).sum()) / (n - 2) * (1 + rho) / (1 - rho) / float(over))
    return float(slope), error, left


def autocorrelation(y: Tensor) -> float:
    """The correlation of a series with itself one block later, around its mean; 0 for a constant."""
    y = y - y.mean()
    total = float((y[:-1] * y[:-1]).sum())
    return float((y[1:] * y[:-1]).sum()) / total if total > 0 else 0.0


def smirnov(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The distance of Kolmogorov and Smirnov between two series, and its probability where their laws are equal.

    Both are thinned to values that are about uncorrelated.

    Example:
        >>> a = torch.tensor([0.512, 0.498, 0.505, 0.49, 0.51, 0.503, 0.497, 0.501], dtype=torch.float64)
        >>> b = torch.tensor([0.5, 0.499, 0.508, 0.494, 0.502, 0.507, 0.496, 0.5], dtype=torch.float64)
        >>> smirnov(a, b)[0]
        0.25
    """
    rho = max(autocorrelation(a), autocorrelation(b), 0.0)
    step = max(1, round((1 + rho) / (1 - min(rho, 0.95)))) if rho > 0.1 else 1
    a, b = a[::step].sort().values, b[::step].sort().values
    every = torch.cat([a, b])
    below = torch.searchsorted(a, every, right=True) / len(a) - torch.searchsorted(b, every, right=True) / len(b)
    distance = float(below.abs().max())
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    x = distance * (root + 0.12 + 0.11 / root)  # Stephens 1970
    terms: Sequence[float] = [2 * (-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101)]
    return distance, min(1.0, max(0.0, sum(terms))) if x > 0.3 else 1.0


def two_sided(t: float, left: float) -> float:
    """The probability of |t| or more under Student's law, by a normal approximation (Wallace 1959).

    Example:
        >>> round(two_sided(2.228, 10), 3)
        0.05
    """
    z = (8 * left + 1) / (8 * left + 3) * math.sqrt(left * math.log1p(t * t / left))
    return math.erfc(z / math.sqrt(2))
