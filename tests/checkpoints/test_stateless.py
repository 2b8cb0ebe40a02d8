"""Optimizers whose state is single numbers resume under FSDP2, which reads a device off tensors with axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_optim import OptimizerStrategy
from tests.harness.ranks import run_ranks
from tests.harness.runs import EPOCH, Setting, Task, saving, task_batches, task_trainer

SPECS: list[dict[str, Any]] = [
    {"name": "koala_v", "sigma": 0.1},
    {"name": "scalar_rmsprop"},
    {"name": "moment_estimation_sgd"},
    {"name": "sgdw", "momentum": 0.0},
]


def go(setting: Setting, specs: list[dict[str, Any]], folder: Path, save: bool, resume: bool) -> list[list[float]]:
    losses = []
    for i, spec in enumerate(specs):
        task = Task(OptimizerStrategy.parse(spec))
        callbacks = [saving(folder / str(i))] if save else []
        fitting = task_trainer(setting, *callbacks, max_epochs=1 if save else 2)
        path = folder / str(i) / "saved.ckpt"
        fitting.fit(task, task_batches(setting.ranks), ckpt_path=path if resume else None)
        losses.append(task.losses)
    return losses


@pytest.mark.parametrize("kind", ["fsdp2 full", "fsdp2 sharded"])
def test_a_state_of_single_numbers_resumes(kind: Any, tmp_path: Path) -> None:
    setting = Setting(kind, 32, 2)
    whole, *_ = run_ranks(go, setting, SPECS, tmp_path, False, False)
    run_ranks(go, setting, SPECS, tmp_path, True, False)
    resumed, *_ = run_ranks(go, setting, SPECS, tmp_path, False, True)
    assert [losses[EPOCH:] for losses in whole] == resumed
