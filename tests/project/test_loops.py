"""The examples without a Trainer: what they reach, how they go on, and their commands as the pages have them."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.fabric import train as by_fabric
from examples.plain_loop import train as plain
from tests.harness.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def config_of(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "examples" / name / "digits.yaml").read_text())
    return {**found, "folder": str(folder), "width": 16, **changes}


def commands(name: str, needs: str = "") -> list[list[str]]:
    """The commands of a page, of those blocks that need no more than `needs`."""
    page = (ROOT / "examples" / name / "README.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    own = [block for block in blocks if block.startswith("# needs: ") == bool(needs) and needs in block]
    return [shlex.split(line) for block in own for line in block.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("name", ["plain_loop", "fabric"])
def test_the_commands_of_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as it stands, with a smaller network and one epoch; the first two of plain_loop go on from each other."""
    monkeypatch.chdir(ROOT)
    lines = commands(name)
    assert len(lines) == (3 if name == "plain_loop" else 1)
    for i, words in enumerate(lines):
        assert words[:2] == ["python", "-m"]
        fast = [f"epochs={i + 1}", "width=16", f"folder={tmp_path}/{min(i, 2) // 2}"]
        monkeypatch.delitem(sys.modules, words[2], raising=False)
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:], *fast])
        runpy.run_module(words[2], run_name="__main__")
        last = capsys.readouterr().out.splitlines()[-1]
        assert re.match(r"accuracy 0\.\d{4}, and 0\.\d{4} with the average of \d+ steps", last)


def test_the_plain_loop_learns_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    found = plain.train(config_of("plain_loop", tmp_path / "whole", epochs=4))
    assert found["last"] > 0.9
    assert found["average"] > 0.9
    plain.train(config_of("plain_loop", tmp_path / "parts", epochs=2))
    assert plain.train(config_of("plain_loop", tmp_path / "parts", epochs=4)) == found
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert one["average"] == other["average"]


def fit(folder: Path, **changes: Any) -> dict[str, float]:
    found = by_fabric.train(config_of("fabric", folder, **changes))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return found


def on_two(folder: Path) -> list[dict[str, float]]:
    """The commands that need two processes, an epoch each; the second goes on from the file of the first."""
    lines = commands("fabric", "two processes")
    options = [yaml.safe_load(words[-1].removeprefix("fabric=")) for words in lines]
    assert [one["strategy"] for one in options] == ["ddp", "fsdp2"]
    return [fit(folder, epochs=i + 1, fabric=one) for i, one in enumerate(options)]


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_fabric_goes_on_under_another_strategy(tmp_path: Path) -> None:
    """DDP, then FSDP2, then one process, from one file."""
    first, second = run_ranks(on_two, tmp_path)
    assert first == second
    third = fit(tmp_path, epochs=3)
    assert third["last"] > 0.9
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 3
    assert saved["average"]["count"] == 12 + 12 + 23


@pytest.mark.parametrize("module", ["plain_loop", "fabric"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer=adamm", "There is no optimizer named 'adamm'. Did you mean adam"),
        ("average={kind: median}", "WeightAverage: kind='median' must be 'mean', 'ema' or 'ema_debiased'."),
        ("", "This example needs sklearn, which"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    module: str, word: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if not word:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    name = f"examples.{module}.train"
    monkeypatch.delitem(sys.modules, name, raising=False)
    words = [f"examples/{module}/digits.yaml", f"folder={tmp_path}", *([word] if word else [])]
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__")
    assert str(end.value).startswith(said)
    assert word or "pip install 'lightning-optim[examples]'" in str(end.value)
