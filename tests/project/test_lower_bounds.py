"""The lowest versions that pyproject.toml allows were tried: what came of it is committed beside the script."""

from __future__ import annotations

import json

from tools.lower_bounds import RESULT, ROOT, lowest


def test_the_bounds_are_those_that_were_tried() -> None:
    """Who changes a bound runs `python tools/lower_bounds.py --python python3.10` and commits its result."""
    found = json.loads(RESULT.read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert found["declared"] == lowest(project)
    for name, version in found["declared"].items():
        installed = found["installed"][name.split("[")[0].replace("-", "_")]
        assert installed.split("+")[0].startswith(version), name
    python = ".".join(found["installed"]["python"].split(".")[:2])
    assert f'requires-python = ">={python}"' in project


def test_all_of_it_passed() -> None:
    found = json.loads(RESULT.read_text())
    assert found["passed"] > 250
    assert found["failed"] == 0
