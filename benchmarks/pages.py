"""Writes results of benchmarks to the marked sections of pages in docs/."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def replace_part(text: str, name: str, new: str) -> str:
    """A page with what stands between the markers of a part replaced.

    Raises:
        ValueError: where the page has no such markers.

    Example:
        >>> page = "a\\n<!-- speed: written by x -->\\nold\\n<!-- end of speed -->\\n"
        >>> print(replace_part(page, "speed", "new"))
        a
        <!-- speed: written by x -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- end of speed -->
        <BLANKLINE>
    """
    part = re.compile(rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->\n)", re.DOTALL)
    if not part.search(text):
        raise ValueError(f"there is no part named {name!r} on the page")
    return part.sub(lambda match: f"{match[1]}\n{new.strip()}\n\n{match[2]}", text)


def write_part(page: str, name: str, new: str) -> None:
    """Replace a part of a page of docs/."""
    path = ROOT / "docs" / page
    path.write_text(replace_part(path.read_text(), name, new))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
