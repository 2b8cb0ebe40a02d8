"""The page for the first ten minutes, done word for word in an empty folder."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_optim.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, of which modules are imported, and forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [os.fspath(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_project", raising=False)  # of another page
    importlib.invalidate_caches()
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if os.fspath(getattr(module, "__file__", None) or "").startswith(os.fspath(tmp_path)):
            del sys.modules[name]


def fenced(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def do(language: str, text: str, folder: Path) -> list[str]:
    """Write a file that names itself in its first line, or run commands; return those that are run."""
    if language in ("python", "yaml"):
        (folder / text.split("\n")[0].removeprefix("# ")).write_text(text)
        return []
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    for words in filter(None, lines):
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
        elif words[:2] != ["pip", "install"]:
            assert words[0] == "lightning-optim"
            run(words[1:])
    return [words[0] for words in lines if words]


def run(args: list[str]) -> None:
    try:
        main(args)
    except SystemExit as end:
        assert not end.code, args  # noqa: PT017


@pytest.mark.filterwarnings("ignore")  # advice of Lightning on workers of loaders and folders that exist
def test_every_command_of_the_start_page_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = [word for language, text in fenced("docs/start.md") for word in do(language, text, folder)]
    assert ran.count("lightning-optim") >= 9
    assert "python" in ran
    files = sorted(folder.glob("lightning_logs/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    first, last = (torch.load(path, weights_only=True) for path in (files[0], files[-1]))
    assert last["epoch"] > first["epoch"]  # the run that went on from the first
    assert "Adan" in capsys.readouterr().out
