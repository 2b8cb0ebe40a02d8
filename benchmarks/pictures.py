"""Small pictures of measurements, created without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = 128
LARGEST = 100_000  # bytes of a picture in the repository


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its axes in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture, with as many colours and dots as keep it small."""
    from PIL import Image

    for dpi in (100, 80, 60):
        figure.savefig(path, dpi=dpi)
        if path.stat().st_size > LARGEST:
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            return
