"""The density of the eigenvalues of a Hessian as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_optim.reports.figures import new_figure


def density_figure(grid: Tensor, density: Tensor, title: str, marks: Sequence[tuple[float, str]] = ()) -> Any:
    """A matplotlib figure of a spectral density with a logarithmic vertical axis.

    Args:
        grid: Eigenvalues, (points,).
        density: The density at each, (points,).
        title: Its title.
        marks: Eigenvalues to mark by a vertical line, each with its label.
    """
    figure = new_figure(7, 4)
    axis = figure.subplots()
    floor = float(density.max()) * 1e-6
    axis.fill_between(grid.tolist(), density.clamp_min(floor).tolist(), floor, alpha=0.6)
    for number, (value, label) in enumerate(marks):
        axis.axvline(value, color=f"C{number + 1}", linestyle="--", label=f"{label} {value:.3g}")
    axis.set_yscale("log")
    axis.set_ylim(bottom=floor)
    axis.set_xlabel("eigenvalue of the Hessian")
    axis.set_ylabel("density")
    axis.set_title(title)
    if marks:
        axis.legend()
    return figure
