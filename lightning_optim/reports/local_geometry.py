"""R_med of several runs in one picture, and their ratio at equal loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.reports.figures import new_figure

History = Sequence[Mapping[str, float]]


def trajectories(runs: Mapping[str, History]) -> Any:
    """A matplotlib figure of R_med over steps, and over the loss, on which runs are to be compared.

    Args:
        runs: The `history` of `LocalGeometry` of each run, by name: `{"Adam": ..., "SGD": ...}`.

    Returns:
        The figure; bars are the error of the estimate.
    """
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, history in runs.items():
        looks = [look for look in history if math.isfinite(look["r_med"])]
        values, errors = [look["r_med"] for look in looks], [min(look["r_med_error"], 1e300) for look in looks]
        for axis, key in ((left, "step"), (right, "loss")):
            axis.errorbar([look[key] for look in looks], values, errors, label=name, marker="o", markersize=3)
    for axis, title in ((left, "optimizer step"), (right, "training loss on the fixed batches")):
        axis.set_xlabel(title)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    if all(look["loss"] > 0 for history in runs.values() for look in history):
        right.set_xscale("log")
    right.invert_xaxis()
    left.set_ylabel("R_med = max |H_ii| / median |H_ii|")
    left.legend()
    return figure


def ratio_at_equal_loss(one: History, other: History) -> list[tuple[float, float]]:
    """R_med of one run over that of another where both had the same loss, which is how the paper compares optimizers.

    The other run is interpolated, in logarithms of R_med, between the looks at which its loss first fell past it.

    Args:
        one: The `history` of `LocalGeometry` of a run.
        other: That of another run of the same model.

    Returns:
        Pairs of a loss and the ratio, for each look of the first run whose loss the other run has had.

    Example:
        >>> adam = [{"loss": 2.0, "r_med": 4.0}, {"loss": 1.0, "r_med": 2.0}]
        >>> sgd = [{"loss": 2.0, "r_med": 4.0}, {"loss": 0.5, "r_med": 4.0}]
        >>> ratio_at_equal_loss(sgd, adam), ratio_at_equal_loss(adam, sgd)
        ([(2.0, 1.0)], [(2.0, 1.0), (1.0, 0.5)])
    """
    found = []
    for look in one:
        there = _at(other, look["loss"])
        if there is not None and math.isfinite(look["r_med"]):
            found.append((look["loss"], look["r_med"] / there))
    return found


def _at(history: History, loss: float) -> float | None:
    """R_med where the loss of a run first fell to a value; None where it never did."""
    looks = [look for look in history if math.isfinite(look["r_med"])]
    for before, after in itertools.pairwise(looks):
        if before["loss"] >= loss >= after["loss"]:
            width = before["loss"] - after["loss"]
            share = (before["loss"] - loss) / width if width else 0.0
            return math.exp((1 - share) * math.log(before["r_med"]) + share * math.log(after["r_med"]))
    return None
