"""The structure of the package in numbers: rooms, arrows between them, circles of files, long files and functions.

    python tools/architecture.py [ROOT]

A room is a folder of `lightning_optim`, or a module at its root. An arrow is an import from one room by another,
wherever it stands: at the top, inside a function or under `TYPE_CHECKING`. A circle is a set of files that import each
other, directly or through others. `tests/project/test_architecture.py` holds these numbers to their limits.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

PACKAGE = "lightning_optim"


def modules(root: Path) -> dict[str, Path]:
    """Every Python module of the package by its dotted name; callbacks under their name in the package."""
    found = {}
    for name, folder in ((PACKAGE, root / PACKAGE), (f"{PACKAGE}.callbacks", root / "callbacks")):
        for file in folder.rglob("*.py"):
            relative = file.relative_to(folder).with_suffix("")
            if name == PACKAGE and relative.parts[0] == "callbacks":  # the link to the folder that comes next
                continue
            parts = [part for part in relative.parts if part != "__init__"]
            found[".".join([name, *parts])] = file
    return found


def imports(module: str, file: Path, known: Collection[str]) -> set[str]:
    """The modules of the package that a file imports, wherever the import stands, relative ones included."""
    found = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in known else source for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in known}


def room(module: str) -> str:
    """The room of a module: the first name below the package. The package itself is the room "package"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "package"


def read(root: Path) -> dict[str, set[str]]:
    """The modules of the package with what each imports."""
    known = modules(root)
    return {name: imports(name, file, known) - {name} for name, file in known.items()}


def arrows(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """For each room the other rooms that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, targets in graph.items():
        found[room(name)] |= {room(target) for target in targets} - {room(name)}
    return dict(found)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of more than one node of a graph that reach each other."""
    reach = {name: _reachable(graph, name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        circle = {other for other in reach[name] if name in reach.get(other, ())} | {name}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def lengths(root: Path) -> Iterator[tuple[int, str]]:
    """Lines of each file of the package and of each function in it, with its name."""
    for file in modules(root).values():
        text = file.read_text()
        name = file.relative_to(root).as_posix()
        yield len(text.splitlines()), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{name}: {node.name}()"


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    graph = read(root)
    between = arrows(graph)
    folders = {file.parent for file in modules(root).values()}
    at_root = [name for name, file in modules(root).items() if file.parent.name == PACKAGE]
    print(f"modules: {len(graph)} in {len(folders)} folders, {len(at_root)} of them at the root")
    print(f"arrows between rooms: {sum(map(len, between.values()))}")
    print(f"imports between files: {sum(map(len, graph.values()))}")
    print(f"circles of rooms: {[sorted(circle) for circle in circles(between)]}")
    print(f"circles of files: {[sorted(circle) for circle in circles(graph)]}")
    print("longest:", "; ".join(f"{n} {name}" for n, name in sorted(lengths(root), reverse=True)[:8]))
    for name in sorted(between, key=lambda name: len(between[name])):
        print(f"  {name} -> {', '.join(sorted(between[name]))}")


if __name__ == "__main__":
    main()
