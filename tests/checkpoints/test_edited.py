"""A checkpoint that was cut off or edited is refused by every rank, in one sentence, and the weights stay as they were.

The callback that sees to it comes by itself with `ConfiguredOptimizer`: the Trainers here have none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim import OptimizerStrategy
from tests.harness.ranks import run_ranks
from tests.harness.runs import Setting, Task, fit, task_batches, task_trainer

SETTINGS = [
    Setting("single", 8, 1),
    Setting("ddp", 8, 2),
    Setting("fsdp1 full", 8, 2),
    Setting("fsdp2 full", 8, 2),
    Setting("fsdp2 full", 32, 2),
]
NUMBER = 2  # of `large.weight` in the model, which is kept in codes


def state(held: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = held["optimizer_states"][0]["state"][NUMBER]
    return found


def misshapen(held: dict[str, Any]) -> None:
    state(held)["exp_avg"] = torch.zeros(3, 3)


def not_a_number(held: dict[str, Any]) -> None:
    state(held)["exp_avg"].view(-1)[-1] = torch.nan  # in the part of the last rank


def without_a_slot(held: dict[str, Any]) -> None:
    del state(held)["exp_avg_sq"]


def before_the_start(held: dict[str, Any]) -> None:
    state(held)["step"] = torch.tensor(-1.0)


def out_of_range(held: dict[str, Any]) -> None:
    held["optimizer_states"][0]["param_groups"][0]["lr"] = -1.0


EDITS: dict[Callable[[dict[str, Any]], None], str] = {
    misshapen: "",  # FSDP says so itself
    not_a_number: "NaN or infinity",
    without_a_slot: "exp_avg_sq",
    before_the_start: "counter",
    out_of_range: "lr",
}


class Before(Callback):
    """Keeps the weights that this rank has before anything is loaded."""

    weights: list[Tensor]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.weights = local_weights(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:  # FSDP, which has divided the weights meanwhile
            self.weights = local_weights(pl_module)


def local_weights(module: LightningModule) -> list[Tensor]:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in module.parameters()]


def refusals(setting: Setting, paths: list[Path]) -> list[tuple[str, bool]]:
    """What is said to each checkpoint on this rank, and whether the weights are as they were."""
    found = []
    for path in paths:
        spec = OptimizerStrategy("adan", state_bits=setting.bits)
        task, before = Task(spec), Before()
        trainer = task_trainer(setting, before, max_epochs=2)
        try:
            trainer.fit(task, task_batches(setting.ranks), ckpt_path=path)
        except Exception as error:
            same = all(map(torch.equal, before.weights, local_weights(task)))
            found.append((f"{type(error).__name__}: {error}", same and not task.losses))
        else:
            found.append(("loaded", False))
    return found


def save(setting: Setting, folder: Path) -> None:
    fit(setting, "adan", folder=folder)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_edited_or_torn_file_is_refused_before_anything_changes(setting: Setting, tmp_path: Path) -> None:
    run_ranks(save, setting, tmp_path, world_size=setting.ranks)
    paths = []
    for edit in EDITS:
        held = torch.load(tmp_path / "saved.ckpt", weights_only=True)
        edit(held)
        paths.append(tmp_path / f"{edit.__name__}.ckpt")
        torch.save(held, paths[-1])
    paths.append(tmp_path / "torn.ckpt")
    whole = (tmp_path / "saved.ckpt").read_bytes()
    paths[-1].write_bytes(whole[: len(whole) // 2])
    said = [*EDITS.values(), "is truncated"]
    found = run_ranks(refusals, setting, paths, world_size=setting.ranks)
    for told in found:
        for path, words, (message, unchanged) in zip(paths, said, told, strict=True):
            assert words in message or "see the error of local rank 0" in message, (path.name, message)
            assert message != "loaded", path.name
            assert unchanged, (path.name, message)
