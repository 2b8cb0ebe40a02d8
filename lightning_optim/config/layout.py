"""Text for a terminal of any width, or for a pipe. A word is never cut."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

UNLIMITED = 10_000


def terminal_width() -> int:
    """The columns of the terminal, or of `COLUMNS`; unlimited in a pipe, so that a line stays one."""
    return shutil.get_terminal_size((UNLIMITED, 24)).columns


def wrapped(text: str, width: int, indent: str = "") -> str:
    """A paragraph in lines of at most `width`, except where a word is longer.

    Example:
        >>> print(wrapped("of incomprehensibilities, two", 12))
        of
        incomprehensibilities,
        two
    """
    return textwrap.fill(
        " ".join(text.split()),
        max(width, len(indent) + 1),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table whose cells are wrapped between words; where not even that fits, an entry of several lines for each row.

    Example:
        >>> print(table(["name", "bytes"], [["adan", "16"]], 80))
        name  bytes
        ----  -----
        adan  16
        >>> print(table(["name", "bytes"], [["adan", "16"]], 10))
        adan
          bytes:
            16
    """
    columns = [[title, *(row[i] for row in rows)] for i, title in enumerate(head)]
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    room = width - 2 * (len(head) - 1)
    if sum(least) > room:
        return "\n".join(_entry(head, row, width) for row in rows)
    while sum(widths) > room:
        widths[max((i for i, size in enumerate(widths) if size > least[i]), key=widths.__getitem__)] -= 1
    lines = []
    for row in (head, ["-" * size for size in widths], *rows):
        cells = [wrapped(cell, size).split("\n") for cell, size in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = (cell[i] if i < len(cell) else "" for cell in cells)
            lines.append("  ".join(part.ljust(size) for part, size in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _entry(head: Sequence[str], row: Sequence[str], width: int) -> str:
    lines = [f"{title}: {cell}" for title, cell in zip(head[1:], row[1:], strict=True) if cell]
    return "\n".join(
        [wrapped(row[0], width), *(textwrap.indent(wrapped(line, width - 2, "  "), "  ") for line in lines)]
    )
