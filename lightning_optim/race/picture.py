"""The picture of a race, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from lightning_optim.errors import MissingPackageError, needed
from lightning_optim.race.comparison import Comparison
from lightning_optim.race.curves import charts
from lightning_optim.race.page import COLOURS


def missing() -> str:
    """Why there will be no picture, as a sentence; empty where there will be."""
    try:
        needed("matplotlib.figure", "The picture of a race")
    except MissingPackageError as error:
        return f"{str(error).rstrip('.')}. The page has the same curves without it."
    return ""


def draw(comparison: Comparison, path: Path) -> bool:
    """Write the picture as PNG.

    Args:
        comparison: What the race has found.
        path: Where to.

    Returns:
        Whether there is a picture; without matplotlib there is none.
    """
    found = charts(comparison)
    if not found or missing():
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(found), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for chart, axes in zip(found, figure.subplots(1, len(found), squeeze=False)[0], strict=True):
        for one in chart.series:
            colour = COLOURS[one.index % len(COLOURS)]
            name = comparison.standings[one.index].name
            style = "--" if one.index % 16 >= 8 else "-"
            axes.plot(one.xs, one.ys, style, color=colour, label=name, marker="o" if chart.marks else "", markersize=4)
            axes.fill_between(one.xs, one.low, one.high, color=colour, alpha=0.16, linewidth=0)
        axes.set(title=chart.title, xlabel=chart.x_label)
        axes.set_xscale("log" if chart.log_x else "linear")
        axes.set_yscale("log" if chart.log_y else "linear")
        axes.grid(alpha=0.3)
        if any(max(one.high) > chart.top for one in chart.series):
            axes.set_ylim(top=chart.top)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
    return True
