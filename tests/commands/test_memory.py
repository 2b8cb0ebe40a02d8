"""`lightning-optim memory`: what it prints, and that a wrong word gets one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from lightning_optim.cli import main

DIGITS = ["--config", f"{Path(__file__).parents[2] / 'examples' / 'digits' / 'adan.yaml'}"]
VALUES = 10_026


class Unready(Callback):
    """One that cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no server")


class Reads(LightningModule):
    """One that reads a file, and then values."""

    def __init__(self, path: str = "no/such/file.pt") -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, int(torch.ones(3, dtype=torch.float32).sum().item()))
        self.layer.load_state_dict(torch.load(path))


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
        (["--picture", "no_folder.d/m.png"], "there is no folder no_folder.d"),
        (["--picture", "/proc/m.png"], "cannot be written: "),
        (["--batch-size", "8"], "Add --activations, or leave it out"),
        (["--trainer.callbacks", f"{__name__}.Unready"], "trainer of the config cannot be built: no server"),
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


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("meta", ["cannot be built on the meta device", "RuntimeError: Tensor.item() cannot be called", "--build cpu"]),
        ("cpu", ["Reads cannot be built (test_memory.py, line ", "FileNotFoundError: ", "no/such/file.pt"]),
    ],
)
def test_what_a_constructor_raises_is_said(where: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{__name__}.Reads", "--optimizer", "adamw", "--build", where) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    assert ("--build cpu" in said) == (where == "meta")


def test_a_config_for_gpus_is_counted_without_any(capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ["--trainer.accelerator", "gpu", "--trainer.precision", "16-mixed", "--trainer.devices"]
    assert run(*DIGITS, "--bits", "32", *gpus, "-1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("devices=-1 is counted as 1: there is no GPU here" in said) != torch.cuda.is_available()
    assert run(*DIGITS, "--bits", "32", *gpus, "4", "--strategy", "fsdp", "--fits", "1.5e9") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "FSDP1 on 4 ranks, precision 16-mixed" in said
    assert "fits 1.50 GB" in said
    assert "there is no GPU" not in said


def test_a_config_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("trainer: {max_epochs: 1}\n")
    for words in (["--config", str(path)], [str(path)]):
        assert run(*words) == 2
        assert "there is no model" in capsys.readouterr().err
