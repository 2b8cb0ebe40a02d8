"""`lightning-optim compare`: from a config to a table, and one sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_optim.cli import main
from tests.harness.trainers import QUIET


@pytest.fixture
def config(tmp_path: Path) -> str:
    content = {
        "seed_everything": 3,
        "model": {
            "class_path": "tests.harness.modules.Configured",
            "init_args": {"optimizer": {"name": "adan", "lr": 0.01}},
        },
        "data": {"class_path": "tests.harness.data.Data"},
        "trainer": {**QUIET, "logger": True, "default_root_dir": str(tmp_path)},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["compare", *arguments])
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def test_a_race_from_a_config(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--config", config, "adan", "{name: sgd, momentum: 0.9, lr: 1e-2}", "torch.optim.SGD", "--extend=0"]
    status, out, err = run(capsys, *words, "--seeds", "2")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "candidate"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["adan", "sgd momentum=0.9", "torch.optim.SGD"]
    assert (
        "18 of 18: torch.optim.SGD lr 0.18 seed 4 finished" in err
    )  # 30 times AdamW's rate, which is a fifth of adan's
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "races"}  # no log, no checkpoint
    folder = tmp_path / "races" / "small"
    assert {path.name for path in folder.iterdir()} == {
        "settings.json",
        "runs.jsonl",
        "result.json",
        "race.html",
        "race.png",
    }
    status, out, err = run(capsys, *words, "--seeds", "2", "--json", "--mode", "max")
    found = json.loads(out)
    assert (status, found["mode"], found["metric"]) == (0, "max", "training loss")
    assert found == json.loads((folder / "result.json").read_text())
    assert "finished" not in err  # all runs are there
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 18
    status, _, err = run(capsys, *words, "--epochs", "2")
    assert (status, err.count("\n")) == (2, 1)
    assert "holds runs with trainer.max_epochs=1, and here it is None" in err


WRONG: list[tuple[list[str], str]] = [
    ([], "there is no candidate to compare"),
    (["adam2"], "candidate 'adam2': There is no optimizer named 'adam2'. Did you mean adam"),
    (["adamw", "adamw"], "candidate 'adamw lr=0.002' is there twice"),
    (["adamw", "--seeds", "0"], "seeds=0 must be a number of seeds, at least 1"),
    (["adamw", "--seeds", "many"], "compare: argument --seeds: 'many' is no number of seeds, such as 5"),
    (["adamw", "--seedz", "3"], "compare has no option '--seedz'. Did you mean --seeds"),
    (["adamw", "--lr", "-1"], "lr=-1.0 must be a number above 0"),
    (["adamw", "--grid", "1,0"], "grid=[1.0, 0.0] must be factors above 0"),
    (["adamw", "--metric", "val/loss"], "there is no metric 'val/loss'"),
    (["adamw", "--epochs", "1", "--steps", "1"], "epochs=1 and steps=1 are both given"),
    (["{name: lion", "adamw"], "candidate '{name: lion' is no mapping"),
    (["adamw", "--trainer.devices", "2"], "the config trains on 2 devices with DDPStrategy"),
    (["adamw", "--trainer.accelerator", "tpu"], "the Trainer of the config cannot be made on this machine: "),
    (["adamw", "--ckpt_path", "a.ckpt"], "ckpt_path resumes a run of one optimizer"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG)
def test_what_is_wrong_gets_one_sentence_and_leaves_nothing(
    words: list[str], sentence: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--config", config, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"lightning-optim: {sentence}")
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "adamw")
    assert (status, err.count("\n")) == (2, 1)
    assert "there is no model" in err


def test_the_help_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: lightning-optim compare --config FILE CANDIDATE")
    assert max(map(len, out.splitlines())) <= 80
