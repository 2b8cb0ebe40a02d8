"""Reads the docstring of a page, and composes the docstring of its constructor."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Collection


def sections(doc: str | None) -> dict[str, str]:
    """The sections of a docstring by heading ("Args", ...), without indentation. The text before them is under "".

    Example:
        >>> found = sections("Adam.\\n\\n    Args:\\n        lr: Step size.\\n\\n    Note:\\n        Warm up.")
        >>> found[""], found["Args"], found["Note"]
        ('Adam.', 'lr: Step size.', 'Warm up.')
    """
    first, *rest = re.split(r"^([A-Z][a-z]+):\n", inspect.cleandoc(doc or ""), flags=re.MULTILINE)
    by_heading = {word: inspect.cleandoc("\n" + text) for word, text in zip(rest[::2], rest[1::2], strict=True)}
    return {"": first.strip(), **by_heading}


def arguments(doc: str | None) -> dict[str, str]:
    """The description of each argument in a docstring, as one line.

    Example:
        >>> arguments("Adam.\\n\\n    Args:\\n        lr: Step\\n            size.\\n        eps: Floor.")
        {'lr': 'Step size.', 'eps': 'Floor.'}
    """
    text = sections(doc).get("Args", "")
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", text, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", what) for name, what in entries}


def constructor_doc(own: str | None, base: str | None, options: Collection[str]) -> str:
    """The docstring of a constructor: options and errors of a page first, then those of all optimizers.

    Args:
        own: The docstring of the page.
        base: The docstring of the base class.
        options: The options of the page: one of the base class may be missing there.
    """
    found, of_base = sections(own), arguments(base)
    shared = {name: text for name, text in of_base.items() if name in options or name == "params"}
    entries = {**shared, **arguments(own)}
    order = [*(name for name in entries if name not in shared or name == "params"), *shared]
    lines = [_entry(name, entries[name]) for name in dict.fromkeys(order)]
    parts = [found[""], "Args:\n" + "\n".join(lines)]
    raises = [doc["Raises"] for doc in (found, sections(base)) if "Raises" in doc]
    if raises:
        parts.append("Raises:\n" + textwrap.indent("\n".join(raises), "    "))
    return "\n\n".join(part for part in parts if part) + "\n"


def _entry(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", 108, initial_indent=" " * 4, subsequent_indent=" " * 8)


def with_formula(source: str, name: str, text: str) -> str:
    """The source of a module with `text` as the formula in the docstring of the class `name`.

    Example:
        >>> source = 'class Lion(Optimizer):\\n    \"\"\"Signs.\\n\\n    Args:\\n        lr: Size.\\n    \"\"\"\\n'
        >>> print(with_formula(source, "Lion", "θₜ = 0"))
        class Lion(Optimizer):
            \"\"\"Signs.
        <BLANKLINE>
            Formula:
                θₜ = 0
        <BLANKLINE>
            Args:
                lr: Size.
            \"\"\"
        <BLANKLINE>
    """
    block = "    Formula:\n" + textwrap.indent(text, " " * 8) + "\n\n"
    start = source.index(f"class {name}(")
    head, args, tail = source[start:].partition("    Args:\n")
    head = re.sub(r"    Formula:\n(?:        .*\n)*\n", "", head)
    return source[:start] + head + block + args + tail
