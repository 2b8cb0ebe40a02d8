"""The files of a comparison: its data, its page and its picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning_optim.errors import OptionError, first_line
from lightning_optim.race.comparison import Comparison
from lightning_optim.race.page import page
from lightning_optim.race.picture import draw
from lightning_optim.race.store import write_text

RESULT, PAGE, PICTURE = "result.json", "race.html", "race.png"


def save(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """Write `race.html`, `race.png` and `result.json`; the picture needs matplotlib and is left out without it.

    Args:
        comparison: What a race has found.
        folder: A folder that exists.

    Returns:
        What was written.

    Raises:
        OptionError: if a file cannot be written.
    """
    written = [Path(folder) / PAGE, Path(folder) / RESULT]
    try:
        write_text(written[0], page(comparison))
        write_text(written[1], json.dumps(comparison.data(), indent=1) + "\n")
        if draw(comparison, Path(folder) / PICTURE):
            written.insert(1, Path(folder) / PICTURE)
    except OSError as error:
        raise OptionError(f"the files of the race cannot be written to {folder}: {first_line(error)}") from error
    return written
