"""`lightning-optim memory`: what it prints, and that a wrong word gets one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_optim.cli import main

DIGITS = ["--config", f"{Path(__file__).parents[2] / 'examples' / 'digits' / 'adan.yaml'}"]
VALUES = 10_026


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["memory", *args])
    return int(end.value.code or 0)


def test_a_config_is_counted_with_its_callbacks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "memory.png"
    assert run(*DIGITS, "--devices", "2", "--fits", "1MB", "--picture", str(path)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "DigitsClassifier, 10 k parameters" in printed
    for words in (
        "DDP on 2 ranks, precision 32-true",
        "averages",
        "fits 1.00 MB",
        "prev_grad",
        "average (a callback's)",
    ):
        assert words in printed
    with Image.open(path) as picture:
        assert picture.size[0] > 500


def test_json_of_several_optimizers_by_import_path(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adamw", "{name: adan, lr: 1e-3}", "torch.optim.SGD"]
    where = ["--strategy", "fsdp", "--trainer.devices", "4", "--bits", "32"]
    assert run("examples.digits.digits.DigitsClassifier", "--optimizer", *words, *where, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["ranks"], found["strategy"], found["sharding"]) == (
        VALUES,
        4,
        "fsdp1",
        "FULL_SHARD",
    )
    states = [one["all_ranks"]["state_bytes"] for one in found["optimizers"]]
    assert states[0] >= 8 * VALUES
    assert states[1] - states[0] == 8 * VALUES
    assert states[2] == 0


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--optimizer", "adamm"], "Did you mean adam"),
        (["--strategy", "dpp"], "there is no strategy 'dpp'. Did you mean ddp"),
        (["--devices", "0"], "at least one device"),
        (["--fits", "much"], "must be a size of memory"),
        (["--picture", "memory.doc"], "must end in .png, .pdf or .svg"),
        (["--bits", "few"], "invalid int value: 'few'"),
        (["--model.wodth", "3"], "Option 'wodth' is not accepted"),
    ],
)
def test_a_wrong_word_gets_one_sentence(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*DIGITS, *args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_a_config_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("trainer: {max_epochs: 1}\n")
    assert run("--config", str(path)) == 2
    assert "there is no model" in capsys.readouterr().err
