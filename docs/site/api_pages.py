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
    """Formulas are kept as they are, line by line, and without the note that Python 3.14 puts before fields."""
    try:
        start = lines.index("Formula:")
    except ValueError:
        return
    lines[start : start + 1] = ["Formula::", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
