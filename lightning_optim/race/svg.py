"""A chart as SVG, to stand in a page of HTML. Colours are CSS classes, so that it follows the page's light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lightning_optim.race.curves import Chart

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 30, 40


def draw(chart: Chart) -> str:
    """The chart in a view of 480 x 300, which scales with the page."""
    xs = [x for one in chart.series for x in one.xs]
    ys = [min(y, chart.top) for one in chart.series for y in (*one.low, *one.high)]
    x_axis = Axis(xs, LEFT, WIDTH - RIGHT, chart.log_x)
    y_axis = Axis(ys, HEIGHT - BOTTOM, TOP, chart.log_y)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        f'<text class="title" x="{LEFT}" y="16">{escape(chart.title)}</text>',
        *_ticks(x_axis, y_axis, chart.x_label),
    ]
    for one in chart.series:
        xs = [x_axis.at(x) for x in one.xs]
        points, upper, lower = (
            [(x, y_axis.at(min(y, chart.top))) for x, y in zip(xs, values, strict=True)]
            for values in (one.ys, one.high, one.low)
        )
        style = f"c{one.index % 8}{' dashed' if one.index % 16 >= 8 else ''}"
        if len(points) > 1:
            parts.append(f'<polygon class="band {style}" points="{_points([*upper, *reversed(lower)])}"/>')
            parts.append(f'<polyline class="line {style}" points="{_points(points)}"/>')
        if chart.marks or len(points) == 1:
            parts += [f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    return "\n".join([*parts, "</svg>"])


class Axis:
    """From values to a range of the picture.

    Args:
        values: What is to fit.
        start: Where the lowest lies.
        end: Where the highest lies.
        log: Whether equal factors have equal lengths.

    Example:
        >>> Axis([1.0, 100.0], 0, 90, log=True).at(10.0)
        45.0
    """

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            room = abs(self.low) / 2 or 1.0
            self.low, self.high = self.low - room, self.high + room

    def at(self, value: float) -> float:
        """Where a value lies."""
        low, high = self._scale(self.low), self._scale(self.high)
        return self.start + (self.end - self.start) * (self._scale(value) - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values in its range, about five."""
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, round((high - low) / 5))
            powers = [10.0**k for k in range(low, high + 1, every)]
            found = [x for x in powers if self.low <= x <= self.high]
            if len(found) >= 3:
                return found
            finer = [m * 10.0**k for k in range(low, high + 1) for m in (1, 2, 5)]
            return [x for x in finer if self.low <= x <= self.high] or [self.low, self.high]
        raw = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _ticks(x_axis: Axis, y_axis: Axis, label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
    for value in x_axis.ticks():
        x = x_axis.at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
    for value in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    middle = (LEFT + right) / 2
    return [*parts, f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(label)}</text>']


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
