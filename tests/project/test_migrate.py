"""The pairs of examples/migrate: what agrees, as its page says, and each file as a program."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from examples.migrate.__main__ import findings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples/migrate/README.md").read_text()

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Swapping scheduler", "ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`", "ignore:.*loads a checkpoint of"),
]


def test_what_agrees(tmp_path: Path) -> None:
    found = dict(findings(tmp_path))
    said = dict(re.findall(r"^(.{64})(.+)$", PAGE, re.MULTILINE))
    known = {label.strip() for label in said}
    assert all(label in known or label == "bitsandbytes" for label in found)
    differences = {label: float(text.split(" of ")[0]) for label, text in found.items() if " of " in text}
    with_last = differences.pop("SWA and IterateAveraging, averages")
    assert with_last > 1e-3  # which averages one epoch more
    assert len(differences) == 4
    assert all(difference < 3e-6 for difference in differences.values())  # float32, after 92 steps
    rest = " ".join(text for label, text in found.items() if "bitsandbytes" in label or "AdamW8bit" in label)
    assert all(float(accuracy) > 0.9 for accuracy in re.findall(r"\d\.\d+", rest))  # none where it is not installed


@pytest.mark.parametrize("name", re.findall(r"^python -m (examples\.migrate\.\w+)$", PAGE, re.MULTILINE))
@pytest.mark.full
def test_each_file(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    runpy.run_module(name, run_name="__main__")
    assert float(re.findall(r"0\.\d+", capsys.readouterr().out)[-1]) > 0.9
