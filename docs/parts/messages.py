"""Every message of the package that a user may meet, read off the source: what is raised, and what is warned of."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SAY = ("OptionError", "RuntimeError", "ValueError", "warn", "rank_zero_warn", "warn_once")
GAP = "…"  # what is filled in


class Message(NamedTuple):
    where: str
    text: str


def messages() -> list[Message]:
    """All that have words of their own; those that only pass on the words of another are left out."""
    files = sorted(
        {path.resolve() for path in (ROOT / "lightning_optim").rglob("*.py")} | {*(ROOT / "callbacks").glob("*.py")}
    )
    found = [
        Message(f"{path.relative_to(ROOT.resolve())}:{node.lineno}", words(node.args[0]))
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and node.args and name_of(node.func) in SAY
    ]
    return [message for message in found if len(message.text.replace(GAP, "").split()) > 2]


def name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def words(node: ast.expr) -> str:
    """The text of a literal, with a gap for each value that is filled in.

    Example:
        >>> words(ast.parse('f"{a} is no {b!r}." + "Give one."', mode="eval").body)
        '… is no ….Give one.'
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return GAP
