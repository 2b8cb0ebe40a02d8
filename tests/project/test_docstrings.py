"""Docstrings of the package have one form."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lightning_optim.language.docstrings import sections

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("lightning_optim", "callbacks") for path in (ROOT / folder).rglob("*.py"))
DOCUMENTED = (ast.FunctionDef, ast.ClassDef)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_errors_are_described_in_lower_case(path: Path) -> None:
    """As in `OptionError: if it is out of range.`"""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, DOCUMENTED)]
    raises = [sections(ast.get_docstring(node)).get("Raises", "") for node in nodes]
    entries = [entry for text in raises for entry in re.findall(r"^\w+: .*", text, re.MULTILINE)]
    assert [entry for entry in entries if not re.match(r"\w+: [a-z`]", entry)] == []
