"""What callbacks log: the same to every logger, under the callback's name, and training does not notice."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_optim.callbacks import Dashboard
from tests.harness.lives import Make, every_callback, fit
from tests.harness.modules import vector

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

OF_MODULE = {"val", "val_raw"}  # what the module logs, and its like for the weights of training
ONLY_TENSORBOARD = ("Overview/", "grad_init/search/")


def scalars(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def columns(folder: Path) -> set[str]:
    path = folder / "metrics.csv"
    first = path.read_text().splitlines()[:1] if path.exists() else []
    return {name for row in csv.reader(first) for name in row} - {"step", "epoch"}


def begins(callback: Any) -> tuple[str, ...]:
    """What tags begin with: the callback's name, whole words of it at least."""
    if isinstance(callback, Dashboard):
        return ("learning_rate", "Overview")
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(callback).__name__).lower()
    words = name.split("_")
    return tuple("_".join(words[:n]) for n in range(1, len(words) + 1))


@every_callback
def test_every_logger_gets_the_same(make: Make, optimizer: Any, tmp_path: Path) -> None:
    callback = make()
    loggers = [TensorBoardLogger(tmp_path, "board", ""), CSVLogger(tmp_path, "table", "")]
    _, logged = fit(optimizer, callback, logger=loggers, log_every_n_steps=1, default_root_dir=tmp_path)
    in_board = {tag for tag in scalars(tmp_path / "board") if not tag.startswith(ONLY_TENSORBOARD)}
    assert in_board - {"epoch", "hp_metric"} == columns(tmp_path / "table")
    names = columns(tmp_path / "table") - OF_MODULE
    assert all(name.partition("/")[0] in begins(callback) for name in names), names
    assert {path.name for path in tmp_path.iterdir()} == {"board", "table"}  # nothing is written elsewhere
    _, silent = fit(optimizer, make(), logger=False)
    assert torch.equal(vector(logged), vector(silent))
