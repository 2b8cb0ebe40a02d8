"""Pieces of Markdown that generated pages share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

WRITTEN = "<!-- written by `make docs` from the classes and from committed results; edit these -->"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table. A bar in a cell is escaped."""
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in [head, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def linked(paper: str) -> str:
    """A source with its arXiv number or repository as a link.

    Example:
        >>> linked("Xie et al. 2022, arXiv:2208.06677")
        'Xie et al. 2022, [arXiv:2208.06677](https://arxiv.org/abs/2208.06677)'
    """
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"(?<![\w/(])github\.com/([\w-]+/[\w-]+)", r"[github.com/\1](https://github.com/\1)", paper)


def replace_part(text: str, name: str, content: str) -> str:
    """A page with new content between the markers of a generated part."""
    part = re.compile(rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->\n)", re.DOTALL)
    return part.sub(lambda match: f"{match[1]}\n{content.rstrip()}\n\n{match[2]}", text)


def yaml_value(value: object) -> str:
    """A value of an option as it stands in a config.

    Example:
        >>> yaml_value((0.9, 0.999)), yaml_value(None), yaml_value(True), yaml_value("none"), yaml_value(1e-8)
        ('[0.9, 0.999]', 'null', 'true', 'none', '1.0e-8')
    """
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(yaml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(one)}" for key, one in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and "e" in repr(value):
        digits, _, power = repr(value).partition("e")
        return f"{digits if '.' in digits else digits + '.0'}e{int(power)}"  # YAML 1.1 reads 1e-8 as a string
    return str(value)
