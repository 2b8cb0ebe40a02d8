"""A run goes on from a checkpoint of `torch.optim`, or from before a callback was added, and says what is fresh."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_optim import OptimizerStrategy
from lightning_optim.callbacks import LookaheadSync
from lightning_optim.checkpoints.consolidate import consolidate
from tests.harness.ranks import run_ranks
from tests.harness.runs import EPOCH, Setting, Task, saving, task_batches, task_trainer
from tests.harness.strategies import Kind


class OfTorch(Task):
    """All parameters in one group, the frozen ones included where the strategy allows it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        frozen_too = not self.trainer.strategy.restore_checkpoint_after_setup
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad or frozen_too], lr=0.01)


class Used(Task):
    """Torch's own loader for FSDP2 wants state of every parameter that is trained."""

    def __init__(self, optimizer: OptimizerStrategy) -> None:
        super().__init__(optimizer)
        self.net.unused.requires_grad_(False)


class UsedOfTorch(Used, OfTorch):
    pass


def go(
    setting: Setting,
    task_class: type[Task],
    folder: Path | None = None,
    resume: Path | None = None,
    lookahead: bool = False,
) -> tuple[list[float], list[str]]:
    """The losses of this rank, or the error, and what was said of a checkpoint."""
    spec = OptimizerStrategy("adamw", lr=0.01, state_bits=setting.bits)
    task = task_class(spec)
    callbacks: list[Callback] = [LookaheadSync(k=2)] if lookahead else []
    callbacks += [] if folder is None else [saving(folder)]
    trainer = task_trainer(setting, *callbacks, max_epochs=1 if folder is not None else 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(task, task_batches(setting.ranks), ckpt_path=resume)
    if resume is not None:  # whatever the groups of the checkpoint were
        assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.0]
    return task.losses, [str(one.message) for one in said if "loads a checkpoint" in str(one.message)]


def settings(*kinds: Kind) -> list[Setting]:
    return [Setting(kind, 32, 1 if kind == "single" else 2) for kind in kinds]


@pytest.mark.parametrize("setting", settings("single", "ddp", "fsdp1 full", "fsdp1 sharded"), ids=str)
def test_a_run_of_torch_goes_on_in_groups_by_role(setting: Setting, tmp_path: Path) -> None:
    """Four steps more: biases no longer decay, which changes a loss by about one part in 10000 (lr × decay)."""
    ranks = setting.ranks
    (whole, _), *_ = run_ranks(go, setting, OfTorch, world_size=ranks)
    run_ranks(go, setting, OfTorch, tmp_path, world_size=ranks)
    (ours, _), *_ = run_ranks(go, setting, Task, resume=tmp_path / "saved.ckpt", world_size=ranks)
    (fresh, _), *_ = run_ranks(go, setting, Task, world_size=ranks)
    assert ours == pytest.approx(whole[EPOCH:], rel=3e-4)
    assert fresh[:EPOCH] != pytest.approx(ours, rel=0.1)


def test_fsdp2_does_not_give_torchs_options_to_the_last_group(tmp_path: Path) -> None:
    """Which `go` asserts of the groups."""
    (setting,) = settings("fsdp2 full")
    (whole, _), *_ = run_ranks(go, setting, UsedOfTorch)
    run_ranks(go, setting, UsedOfTorch, tmp_path)
    (ours, _), *_ = run_ranks(go, setting, Used, resume=tmp_path / "saved.ckpt")
    assert ours == pytest.approx(whole[EPOCH:], rel=3e-4)


@pytest.mark.parametrize("setting", settings("single", "fsdp1 full", "fsdp2 full", "fsdp2 sharded"), ids=str)
def test_slow_weights_that_a_checkpoint_lacks_begin_at_the_loaded_weights(setting: Setting, tmp_path: Path) -> None:
    """Under FSDP2 torch hands back what the optimizer held before the load. One parameter never has a gradient."""
    ranks, path = setting.ranks, tmp_path / "saved.ckpt"
    run_ranks(go, setting, Task, tmp_path, world_size=ranks)
    if setting.kind == "fsdp2 sharded":
        with pytest.raises(AssertionError, match=r"holds no optimizer_0\.state\.\S+\.slow, and FSDP2 reads"):
            run_ranks(go, setting, Task, resume=path, lookahead=True, world_size=ranks)
        consolidate(path, tmp_path / "full.ckpt")
        path = tmp_path / "full.ckpt"
    (losses, said), *_ = run_ranks(go, setting, Task, resume=path, lookahead=True, world_size=ranks)
    assert said == ["AdamW loads a checkpoint with other state: exp_avg, exp_avg_sq, step taken; slow starts fresh."]
    # DDP saves and resumes what one process does, so what it goes on with is right for all.
    ddp = Setting("ddp", 32, 2) if ranks == 2 else setting
    run_ranks(go, ddp, Task, tmp_path / "ddp", world_size=ranks)
    (right, _), *_ = run_ranks(go, ddp, Task, resume=tmp_path / "ddp" / "saved.ckpt", lookahead=True, world_size=ranks)
    assert losses == pytest.approx(right, rel=1e-4)
