"""The files around the code agree with it: hooks, workflows, citation, and the check of a wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_optim
from tools import check_wheel

ROOT = Path(__file__).parents[2]
VERSION = lightning_optim.__version__
INFO = f"lightning_optim-{VERSION}.dist-info"
METADATA = f"Metadata-Version: 2.4\nName: lightning-optim\nVersion: {VERSION}\n"
COMMAND = "[console_scripts]\nlightning-optim = lightning_optim.cli:main\n"


def read(name: str) -> Any:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is no part of an sdist")
    return yaml.safe_load(path.read_text())


def wheel(folder: Path, *more: str, without: str = "", metadata: str = METADATA) -> Path:
    """A wheel whose modules are empty."""
    names = {f"lightning_optim/{name}" for name in check_wheel.REQUIRED}
    path = folder / f"lightning_optim-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted({*names, *more} - {without}):
            archive.writestr(name, "")
        archive.writestr(f"{INFO}/METADATA", metadata)
        archive.writestr(f"{INFO}/entry_points.txt", COMMAND)
    return path


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == VERSION
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_a_good_wheel_passes(tmp_path: Path) -> None:
    assert check_wheel.problems(wheel(tmp_path, "lightning_optim/callbacks/loss_input.py"), f"v{VERSION}") == []
    assert check_wheel.main([str(tmp_path), "--tag", f"v{VERSION}"]) == 0


@pytest.mark.parametrize("name", check_wheel.REQUIRED)
def test_a_wheel_without_a_file_that_it_must_hold(tmp_path: Path, name: str) -> None:
    assert check_wheel.problems(wheel(tmp_path, without=f"lightning_optim/{name}")) == [
        f"lightning_optim/{name} is missing."
    ]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tests/test_it.py", "is outside of lightning_optim."),
        ("lightning_optim.pth", "is outside of lightning_optim."),
        ("lightning_optim-0.0.dist-info/RECORD", "is outside of lightning_optim."),
        ("lightning_optim/tests/test_it.py", "does not belong there."),
        ("lightning_optim/__pycache__/cli.pyc", "does not belong there."),
        ("lightning_optim/engines/kernel.so", "does not belong there."),
    ],
)
def test_a_wheel_with_a_file_that_it_must_not_hold(tmp_path: Path, name: str, problem: str) -> None:
    assert check_wheel.problems(wheel(tmp_path, name)) == [f"{name} {problem}"]


def test_a_wheel_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_wheel.main([str(wheel(tmp_path)), "--tag", "v99.0"]) == 1
    assert f"The tag is v99.0, and the version is {VERSION}." in capsys.readouterr().err


def test_two_wheels_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(tmp_path).with_name("other.whl").touch()
    assert check_wheel.main([str(tmp_path)]) == 1
    assert "2 wheels, not one" in capsys.readouterr().err


def test_hooks_run_the_ruff_that_make_check_runs() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pins = re.findall(r"ruff==\S+?(?=[],\s])", yaml.safe_dump(read(".pre-commit-config.yaml")))
    assert pins
    assert set(pins) == {line for line in constraints if line.startswith("ruff==")}


def test_hooks_can_be_read() -> None:
    pytest.importorskip("pre_commit", reason="pre-commit is a tool of development")
    read(".pre-commit-config.yaml")
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config"], cwd=ROOT, check=True)


def test_workflows_run_targets_of_the_makefile() -> None:
    read(".github/workflows/ci.yml")
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    asked = {word for file in files for word in re.findall(r"\bmake ([a-z-]+)", _commands(file))}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert asked
    assert asked <= targets


def test_workflows_test_the_versions_of_python_that_the_metadata_names() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    tested = {entry["python"] for entry in jobs["test"]["strategy"]["matrix"]["include"]}
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert tested == set(named)


def _commands(workflow: Path) -> str:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return "\n".join(step.get("run", "") for job in jobs for step in job["steps"])
