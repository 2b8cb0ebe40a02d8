"""The structure of the package: which room imports which, no circles, short files. `tools/architecture.py` counts."""

from __future__ import annotations

import re
from pathlib import Path

from tools import architecture

ROOT = Path(__file__).parents[2]

# Which room may import which, from what is imported by many to what imports many. A new arrow needs a reason, and a
# line in ARCHITECTURE.md.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "language": {"errors"},
    "distributed": {"errors", "language"},
    "storage": {"language", "distributed"},
    "engines": {"errors", "language", "distributed", "storage"},
    "stages": {"language", "distributed"},
    "core": {"errors", "language", "distributed", "storage", "engines", "stages"},
    "optimizers": {"language", "core"},
    "checkpoints": {"errors"},
    "analysis": {"errors", "distributed"},
    "training": {"errors", "distributed", "language", "storage", "core", "analysis"},
    "reports": {"errors", "distributed", "storage", "core", "analysis", "training"},
    "nn": {"errors"},
    "callbacks": {"errors", "distributed", "stages", "core", "analysis", "training", "checkpoints", "reports"},
    "config": {
        *("errors", "language", "distributed", "storage", "engines", "core"),
        *("training", "reports", "callbacks"),
    },
    "race": {"errors", "core", "training", "reports", "config"},
    "estimate": {"errors", "language", "distributed", "core", "training", "reports", "callbacks", "config"},
    "commands": {"errors", "training", "reports", "callbacks", "config", "race", "estimate"},
    "cli": {"errors", "commands"},
    "package": {"errors", "core", "optimizers", "config", "estimate", "commands"},
}


def test_imports_point_downward() -> None:
    order = list(ALLOWED)
    for name, targets in ALLOWED.items():
        assert all(order.index(target) < order.index(name) for target in targets), name
    found = architecture.arrows(architecture.read(ROOT))
    assert set(found) <= set(ALLOWED), "a new room: give it a line in ALLOWED and in ARCHITECTURE.md"
    new = {name: targets - ALLOWED[name] for name, targets in found.items() if targets - ALLOWED[name]}
    assert not new, f"new arrows between rooms: {new}"
    unused = {name: ALLOWED[name] - found.get(name, set()) for name in ALLOWED}
    assert not any(unused.values()), f"allowed and not there any more: {unused}"


def test_no_two_files_import_each_other() -> None:
    """Not in a circle either, nor inside functions, nor under TYPE_CHECKING."""
    assert architecture.circles(architecture.read(ROOT)) == []


def test_the_root_holds_few_modules() -> None:
    assert len([file for file in (ROOT / "lightning_optim").glob("*.py")]) <= 8


def test_files_and_functions_are_short() -> None:
    for lines, name in architecture.lengths(ROOT):
        assert lines <= (60 if name.endswith("()") else 350), f"{name} has {lines} lines"


def test_the_page_says_which_room_imports_which() -> None:
    rows = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \| .* \| ([a-z, ]*)\|$", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    said = {name: set(filter(None, map(str.strip, targets.split(",")))) for name, targets in rows}
    assert said == {name: targets for name, targets in ALLOWED.items() if name != "package"}


def test_what_is_counted(tmp_path: Path) -> None:
    """Imports inside functions, under TYPE_CHECKING and relative ones count; a room is a folder."""
    files = {
        "one/a.py": "def f():\n    from lightning_optim.two import b\n",
        "two/b.py": "from ..three.c import x\n",
        "three/c.py": "if TYPE_CHECKING:\n    from lightning_optim.one.a import f\n",
        "three/d.py": "import lightning_optim.three.c\nfrom . import c\nimport os\n",
    }
    for name, text in files.items():
        file = tmp_path / "lightning_optim" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "callbacks").mkdir()
    graph = architecture.read(tmp_path)
    assert architecture.arrows(graph) == {"one": {"two"}, "two": {"three"}, "three": {"one"}}
    assert [sorted(name[-1] for name in circle) for circle in architecture.circles(graph)] == [["a", "b", "c"]]
