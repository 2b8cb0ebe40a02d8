"""The bounds of pyproject.toml were tried, and the newest versions: what came of it is committed beside the script."""

from __future__ import annotations

import json
import re
from typing import Any

from tools.versions import RESULT, ROOT, SETTINGS, lowest

PROJECT = (ROOT / "pyproject.toml").read_text()


def settings() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RESULT.read_text())["settings"]
    return found


def version(setting: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", setting["installed"][name].split("+")[0])))


def test_the_bounds_are_those_that_were_tried() -> None:
    """Who changes a bound runs `make versions` and commits its result."""
    declared = json.loads(RESULT.read_text())["declared"]
    assert declared == lowest(PROJECT)
    for name, bound in declared.items():
        installed = settings()["lowest"]["installed"][name.split("[")[0].replace("-", "_")]
        assert installed.split("+")[0].startswith(bound), name


def test_each_setting_has_the_versions_that_it_names() -> None:
    assert {"lowest", "newest"} <= set(settings()) <= set(SETTINGS)
    for name, found in settings().items():
        setting = SETTINGS[name]
        assert version(found, "python")[:2] == tuple(map(int, setting.python.split("."))), name
        for package in ("torch", "lightning"):
            is_lowest = getattr(setting, package) == "lowest"
            assert found["installed"][package].startswith(lowest(PROJECT)[package]) == is_lowest, (name, package)


def test_the_lowest_and_the_newest_python_are_those_of_the_metadata() -> None:
    classified = [tuple(map(int, found.split("."))) for found in re.findall(r'Python :: (3\.\d+)"', PROJECT)]
    tried = [version(setting, "python")[:2] for setting in settings().values()]
    assert (min(tried), max(tried)) == (min(classified), max(classified))
    assert f'requires-python = ">={".".join(map(str, min(tried)))}"' in PROJECT


def test_all_of_it_passed() -> None:
    for name, found in settings().items():
        assert found["passed"] > 250, name
        assert found["failed"] == 0, name
