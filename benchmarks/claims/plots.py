"""What the pictures of experiments share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.claims.results import Measured

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")


def band(axes: Any, xs: Sequence[float], columns: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """A line through the means of columns, with a band of one standard deviation to either side."""
    means = [statistics.fmean(column) for column in columns]
    deviations = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    (line,) = axes.plot(xs, means, label=label, **style)
    low = [m - d for m, d in zip(means, deviations, strict=True)]
    high = [m + d for m, d in zip(means, deviations, strict=True)]
    axes.fill_between(xs, low, high, alpha=0.18, linewidth=0, color=line.get_color())


def by_rate(axes: Any, found: Measured, arm: str, metric: str | None = None, label: str = "", **style: Any) -> None:
    """A metric against the learning rate, over all measured rates of an arm of one cell."""
    rates = [lr for lr in found.rates(arm) if found.values(arm, lr, metric)]
    columns = [list(found.values(arm, lr, metric).values()) for lr in rates]
    band(axes, rates, columns, label or arm, marker="o", markersize=3, **style)
    axes.set(xscale="log", xlabel="learning rate")
    log_ticks(axes, {float(x) for line in axes.lines for x in line.get_xdata()})


def log_ticks(axes: Any, values: Iterable[float], digits: int = 3) -> None:
    """Label a logarithmic axis at these values alone; the labels between powers of ten would run into each other."""
    ticks = sorted(values)
    axes.set_xticks(ticks, [f"{x:.{digits}g}" for x in ticks])
    axes.set_xticks([], minor=True)


def by_step(
    axes: Any, found: Measured, arm: str, curve: str, lr: float | None = None, label: str = "", **style: Any
) -> None:
    """A curve of an arm over steps, at its best cell or at a learning rate; as far as all seeds have come."""
    curves = found.curves(arm, curve, lr)
    length = min(len(ys) for _, ys in curves)
    columns = [[ys[i] for _, ys in curves] for i in range(length)]
    band(axes, list(curves[0][0][:length]), columns, label or arm, **style)
    axes.set(xlabel="step")


def heat_map(
    axes: Any, rows: Sequence[Any], columns: Sequence[Any], values: Sequence[Sequence[float]], title: str
) -> None:
    """Values as colours with their numbers, a row for each of `rows`."""
    axes.imshow(values, aspect="auto", cmap="viridis_r")
    axes.set(title=title)
    axes.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
    axes.set_yticks(range(len(rows)), [f"{x:g}" for x in rows])
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7, color="white")
