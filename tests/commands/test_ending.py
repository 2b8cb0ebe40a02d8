"""What `lightning-optim fit` says at its end, and its sentences for logs that cannot be written."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_optim.callbacks import IterateAveraging
from lightning_optim.cli import main
from lightning_optim.reports.ending import command, ending
from tests.harness.data import batches
from tests.harness.modules import Configured
from tests.harness.trainers import trainer


class Judged(Configured):
    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True)


def said(folder: Path, logger: Any, *callbacks: Any, seconds: float = 1.0) -> dict[str, str]:
    run = trainer(*callbacks, logger=logger, max_epochs=1, log_every_n_steps=1, default_root_dir=folder)
    module = Judged({"name": "adan", "schedule": "cosine"})
    run.fit(module, batches(), batches(batch_size=16))
    first, *rest = ending(run, module, seconds)
    return {"": first, **dict(re.split(r"  +", line.strip(), maxsplit=1) for line in rest)}


def test_it_says_what_came_out_and_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = said(tmp_path, TensorBoardLogger("logs", "toy"), IterateAveraging(start=0, evaluate_raw=True), seconds=75.2)
    assert lines[""] == "Judged by adan with schedule cosine: 4 steps, 1 epoch in 1 min 15 s."
    assert re.fullmatch(r"\S+ with the average of the weights, \S+ with the last weights", lines["val/loss"])
    values = 4 * 6 + 6 + 6 * 2 + 2
    assert lines["optimizer state"] == f"{5 * values * 4 + 4 * 4} B beside {values * 4} B of parameters"
    assert lines["log"] == "logs/toy/version_0"
    assert lines["see curves"].endswith("tensorboard --logdir logs")
    assert "see numbers" not in lines


def test_other_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(tmp_path, CSVLogger("logs", "toy"))["see numbers"] == "logs/toy/version_0/metrics.csv"
    silent = said(tmp_path, False)
    assert {"", "val/loss", "optimizer state"} == set(silent)
    assert re.fullmatch(r"[\d.e-]+", silent["val/loss"])


def test_a_command_that_is_not_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/activate").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("tensorboard", "--logdir", "my logs") == "source env/bin/activate && tensorboard --logdir 'my logs'"
    (tmp_path / "tensorboard").touch(mode=0o755)
    assert command("tensorboard", "--logdir", "logs") == "tensorboard --logdir logs"


def fit(folder: Path, *options: str) -> None:
    """The command with a TensorBoardLogger that writes to `logs`."""
    path = folder / "fit.yaml"
    path.write_text(f"""
seed_everything: 0
model: tests.harness.modules.Configured
data: tests.harness.data.Data
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {folder}
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}/logs, name: toy, version: mine}}
""")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["fit", f"--config={path}", *options])


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        fit(folder, *options)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return next(line for line in printed.splitlines() if line.startswith("lightning-optim: "))


def test_the_command_ends_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    out, err = capsys.readouterr()
    assert "\nConfigured by adan: 4 steps, 1 epoch in " in out
    assert f"tensorboard --logdir {tmp_path}/logs" in out
    assert f"lightning-optim compare --config {tmp_path}/fit.yaml adan adamw" in out
    assert "litlogger" not in out + err
    sentence = refused(capsys, tmp_path)
    assert "the log folder is taken" in sentence
    assert f"{tmp_path}/logs/toy/mine/config.yaml" in sentence


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file")
    sentence = refused(capsys, tmp_path)
    assert f"the folder '{tmp_path}/logs' cannot be written (FileExistsError: File exists)" in sentence
    assert "save_dir of the logger" in sentence
