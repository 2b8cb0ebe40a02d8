"""Tests stand by themselves: what they share is in tests/harness, and nothing outside of tests imports them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "callbacks", "docs", "examples", "lightning_optim", "tests", "tools")


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, by their full names; of `from a import b` both a and a.b."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports() -> Iterator[tuple[Path, str]]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    for file in files:
        for name in imported(file):
            yield file.relative_to(ROOT), name


def test_no_test_is_imported() -> None:
    """Neither are conftest files, whose fixtures pytest finds."""
    found = [(str(file), name) for file, name in imports() if name.startswith("tests.")]
    assert len(found) > 100  # they are seen at all
    assert not [(file, name) for file, name in found if any(p.startswith("test_") for p in name.split("."))]
    assert not [(file, name) for file, name in found if "conftest" in name.split(".")]


def test_nothing_outside_of_tests_imports_them() -> None:
    assert not [(str(f), name) for f, name in imports() if f.parts[0] != "tests" and name.split(".")[0] == "tests"]


def test_tests_lie_in_rooms() -> None:
    """At the top there is none; every room of the package has one here. Stages are tested where callbacks are."""
    assert not list((ROOT / "tests").glob("test_*.py"))
    rooms = {path.parent.name for path in (ROOT / "lightning_optim").glob("*/__init__.py")}
    assert "engines" in rooms
    assert rooms - {"stages"} <= {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
