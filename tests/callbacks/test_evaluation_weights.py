"""Schedule-Free in real Trainers: what is validated, tested, saved and resumed, against the averages by definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import Tensor, nn

from lightning_optim import ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from lightning_optim.callbacks import (
    EvaluationWeights,
)
from lightning_optim.core.optimizer import Optimizer
from tests.harness.data import batches
from tests.harness.journeys import JOURNEYS, journey
from tests.harness.modules import Configured, Make, Toy, vector
from tests.harness.ranks import run_ranks
from tests.harness.trainers import Run, trainer

ROUNDING = 1e-13  # of a division in float64


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeAdamW(params, lr=0.02, warmup_steps=3)


def sgd(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeSGD(params, lr=0.5, weight_decay=0.01)


def radam(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeRAdam(params, lr=0.02, betas=(0.9, 0.9))


def eight(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeAdamW(params, lr=0.02, state_bits=8)


def averages(run: Run) -> list[Tensor]:
    """The average x after each step, by its definition from the points y and z that training had."""
    return [(y - 0.1 * z) / 0.9 for y, z in zip(run.walk.weights, run.walk.slots, strict=True)]


def weights_in(path: Path) -> Tensor:
    saved = torch.load(path, weights_only=True)
    return torch.cat([value.reshape(-1) for value in saved["state_dict"].values()])


def close(x: Tensor, y: Tensor, tolerance: float = ROUNDING) -> bool:
    return torch.allclose(x.double(), y.double(), rtol=0, atol=tolerance)


# ---------------------------------------------------------------- what is evaluated and saved


@pytest.mark.parametrize("make", [adamw, sgd, radam])
def test_everything_that_is_evaluated_and_saved_is_the_average(make: Make, tmp_path: Path) -> None:
    """Validation within and after epochs, whole checkpoints, weights alone, the model after the fit, its test."""
    saving = [
        ModelCheckpoint(tmp_path / "full", "{step}", save_top_k=-1, every_n_train_steps=3),
        ModelCheckpoint(tmp_path / "only", "{step}", save_top_k=-1, every_n_train_steps=1, save_weights_only=True),
        ModelCheckpoint(tmp_path / "epoch", "{step}", save_top_k=-1, every_n_epochs=1),
    ]
    options: dict[str, Any] = {"precision": "64-true", "val_check_interval": 2, "num_sanity_val_steps": 1}
    run = Run(make, EvaluationWeights(), *saving, watch="z", **options)
    with pytest.warns(UserWarning, match="without the callback EvaluationWeights, so what is validated and saved"):
        plain = Run(make, **options)
    assert all(map(torch.equal, run.walk.weights, plain.walk.weights))  # validations and saves leave no trace
    x = averages(run)
    torch.manual_seed(0)
    assert torch.equal(run.module.validated[0], vector(Toy(make).double()))  # the sanity check
    for i, seen in enumerate(run.module.validated[1:]):
        assert close(seen, x[2 * (i // 2) + 1])
    for folder, steps in (("full", [3, 6, 9, 12]), ("only", range(1, 13)), ("epoch", [4, 8, 12])):
        for step in steps:
            assert close(weights_in(tmp_path / folder / f"step={step}.ckpt"), x[step - 1]), (folder, step)
            if folder == "full":
                saved = torch.load(tmp_path / folder / f"step={step}.ckpt", weights_only=True)["optimizer_states"][0]
                assert not saved["param_groups"][0]["train_mode"]
                raw = torch.cat([state["raw"].reshape(-1) for state in saved["state"].values()])
                assert torch.equal(raw, run.walk.weights[step - 1])
    assert close(vector(run.module), x[-1])
    assert not any("raw" in state for state in plain.trainer.optimizers[0].state.values())
    run.trainer.test(run.module, batches(), verbose=False)
    assert torch.equal(run.module.tested[-1], vector(run.module))
    run.trainer.validate(run.module, batches(), verbose=False)
    assert torch.equal(run.module.validated[-1], vector(run.module))


def test_the_mixin_brings_the_callback_for_pages_that_evaluate_other_weights() -> None:
    """Nothing is asked of the user; the same model without validation ends with the same average."""
    ends = []
    for options in ({}, {"limit_val_batches": 0}):
        seed_everything(0, verbose=False)
        module = Configured({"name": "schedule_free_adamw", "lr": 0.02, "warmup_steps": 3})
        fitting: Any = trainer(precision="64-true", **options)
        fitting.fit(module, batches())
        assert [type(one).__name__ for one in fitting.callbacks if isinstance(one, EvaluationWeights)]
        assert not fitting.optimizers[0].is_training
        for p, state in fitting.optimizers[0].state.items():
            assert close(p, (state["raw"] - 0.1 * state["z"]) / 0.9)
        ends.append(vector(module))
    assert torch.equal(*ends)
    module = Configured("adamw")
    fitting = trainer()
    fitting.fit(module, batches())
    assert not any(isinstance(one, EvaluationWeights) for one in fitting.callbacks)


@pytest.mark.parametrize("kind", JOURNEYS)
def test_every_strategy_evaluates_saves_and_resumes_the_average(kind: str, tmp_path: Path) -> None:
    """To the rounding of float32 in a dozen steps; what resumes goes on bit for bit."""
    alone = journey("single", adamw, EvaluationWeights, tmp_path / "alone")
    both = run_ranks(journey, kind, adamw, EvaluationWeights, tmp_path / "whole")
    for whole in both:
        for key in ("train", "val", "test"):
            assert whole[key] == pytest.approx(alone[key], rel=1e-4), key
        assert sum(whole["test"]) / 2 == pytest.approx(whole["best"], rel=1e-6)
        assert len(set(whole["val"])) == 6
    saved = tmp_path / "whole" / "step=4.ckpt"
    resumed = run_ranks(journey, kind, adamw, EvaluationWeights, tmp_path / "rest", False, saved)
    for whole, rest in zip(both, resumed, strict=True):
        assert rest["train"] == whole["train"][4:]
        assert rest["val"] == whole["val"][2:]
