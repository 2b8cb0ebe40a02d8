"""A page with the comment `<!-- api: module -->` gets the documentation of each name in its tables, from docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from sphinx.application import Sphinx

MARK = re.compile(r"<!-- api: ([\w.]+) -->")
NAME = re.compile(r"(?m)^\| `(\w+)` \|")


def directive(module: str, name: str) -> str:
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        return f".. autoclass:: {module}.{name}\n   :members:\n"
    kind = "function" if inspect.isroutine(thing) else "data"
    return f".. auto{kind}:: {module}.{name}\n"


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    if found := MARK.search(source[0]):
        body = "\n".join(directive(found[1], name) for name in NAME.findall(source[0]))
        source[0] += f"\n## In full\n\n```{{eval-rst}}\n{body}```\n"


def docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: bars and stars mean themselves. Formulas keep their lines."""
    found, in_formula = [], False
    for line in lines:
        in_formula = line == "Formula:" or (in_formula and (not line or line.startswith(" ")))
        kept = in_formula or line.lstrip().startswith((">>>", "..."))
        found += ["Formula::", ""] if line == "Formula:" else [line if kept else escaped(line)]
    lines[:] = found


def escaped(line: str) -> str:
    parts = line.split("`")
    parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
