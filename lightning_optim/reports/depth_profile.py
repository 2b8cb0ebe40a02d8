"""A profile by depth for people: a table, a figure, and values for loggers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lightning_optim.analysis.depth_profile import DepthProfile
from lightning_optim.errors import needed
from lightning_optim.reports.figures import new_figure

PREFIX = "gradient_norm_profile"
CURVES = 8  # in a figure


def metrics(profile: DepthProfile) -> dict[str, float]:
    """The values for any logger, by key: each block's norms, and what they are judged by."""
    part = profile.part
    values = {"last_over_first": profile.last_over_first(part), "slope": profile.slope(part)}
    values["residual_growth"] = profile.growth()
    digits = len(str(len(profile.names) - 1))
    for name, norms in (*profile.norms.items(), ("residual", profile.residual)):
        values |= {f"{name}/{level:0{digits}}": value for level, value in enumerate(norms)}
    prefix = f"{PREFIX}/{profile.stack}" if profile.stack else PREFIX
    return {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}


def table(profile: DepthProfile) -> Table:
    """The norms of each block."""
    stack = profile.stack or "the module"
    found = Table(title=f"Gradient norms of {stack} ({len(profile.names)} blocks) before step {profile.step + 1}")
    found.add_column("block", overflow="fold")
    columns = [*profile.norms.values(), *([profile.residual] if profile.residual else [])]
    for name in (*profile.norms, *(["|x|²/d"] if profile.residual else [])):
        found.add_column({"block": "whole block"}.get(name, name.replace("_", " ")), justify="right")
    for level, name in enumerate(profile.names):
        found.add_row(name, *("–" if math.isnan(values[level]) else f"{values[level]:.4g}" for values in columns))
    return found


def chosen(profiles: Sequence[DepthProfile], count: int = CURVES) -> list[DepthProfile]:
    """At most `count` profiles, the first and the last among them, with equal distances between."""
    if len(profiles) <= count:
        return list(profiles)
    return [profiles[round(i * (len(profiles) - 1) / (count - 1))] for i in range(count)]


def picture(profiles: Sequence[DepthProfile]) -> Any:
    """A matplotlib figure of one stack: gradient norms and residual norms against depth, a curve for each look."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    colors = needed("matplotlib", "A figure").colormaps["viridis"]
    curves = chosen(profiles)
    part = curves[0].part
    for i, profile in enumerate(curves):
        color = colors(i / max(1, len(curves) - 1) * 0.9)
        depth = range(1, len(profile.names) + 1)
        left.plot(depth, profile.norms.get(part, profile.norms["block"]), "o-", color=color, label=str(profile.step))
        if profile.residual:
            right.plot(depth, profile.residual, "o-", color=color, label=str(profile.step))
    left.set_yscale("log")
    left.set_title("gradient norm of the " + {"block": "whole block"}.get(part, part.replace("_", " ")))
    right.set_title("residual norm after the block, |x|²/d")
    for axis in (left, right):
        axis.set_xlabel("block")
    left.legend(title="step")
    figure.suptitle(f"{curves[0].stack or 'the module'}, {len(curves[0].names)} blocks")
    return figure
