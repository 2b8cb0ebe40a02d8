"""Figures of matplotlib, which an extra brings, and what to say where it is not installed."""

from __future__ import annotations

import importlib.util
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_optim.errors import needed, pip_command

_told: set[str] = set()


def can_draw(owner: str) -> bool:
    """Whether matplotlib is installed; where it is not, the log says once what is missing and how to get it.

    Args:
        owner: Whose figures they are, for the message.
    """
    found = importlib.util.find_spec("matplotlib") is not None
    if not found and owner not in _told:
        _told.add(owner)
        rank_zero_info(f"{owner} logs no figures, for matplotlib is not installed. Type: {pip_command('matplotlib')}")
    return found


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, which no window shows.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    return needed("matplotlib.figure", "A figure").Figure(figsize=(width, height), layout="constrained")
