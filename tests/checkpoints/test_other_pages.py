"""A run that goes on with another page from a checkpoint: what it takes over makes no step longer than a fresh one."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from tests.harness.data import batches
from tests.harness.modules import Configured
from tests.harness.problems import NAMES, apply, build
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer

BEFORE, AFTER = 30, 5
SHAPE = (6, 4)
KEEPING: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "rmsprop": {"momentum": 0.9},
    "adafactor": {"mode": "paper", "beta1": 0.9},
}


def gradient(step: int, scale: float) -> Tensor:
    """Mostly the same direction, as of a model in training."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return scale * (1 + 0.3 * noise)


def stepped(optimizer: Optimizer, p: Tensor, steps: range, scale: float) -> float:
    """Take steps; the length of the longest."""
    longest = 0.0
    for step in steps:
        before = p.detach().clone()
        apply(optimizer, [p], [gradient(step, scale)], step)
        longest = max(longest, float((p.detach() - before).norm()))
    return longest


@functools.cache
def trained(name: str, scale: float) -> tuple[Tensor, dict[str, Any]]:
    p = nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    optimizer = build(name, [p], engine="reference", **KEEPING.get(name, {}))
    stepped(optimizer, p, range(BEFORE), scale)
    return p.detach(), optimizer.state_dict()


def test_slots_of_one_name_hold_numbers_of_one_size() -> None:
    """Of the same gradients, or `mean_of` says that they are means of something else."""
    sizes: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for name in NAMES:
        for slot, value in trained(name, 1e-3)[1]["state"][0].items():
            declared = OPTIMIZERS[name].slots.get(slot)
            if declared is not None and declared.per in ("element", "matrix") and not declared.copies:
                sizes[slot, declared.mean_of][name] = float(value.norm())
    for slot, found in sizes.items():
        assert max(found.values()) < 20 * min(found.values()), (slot, found)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("adamw", "prodigy"),
        ("prodigy", "adamw"),
        ("adopt", "adamw"),
        ("sgd", "adopt"),
        ("adamw", "nadam"),
        ("adamw", "adabelief"),
        ("mars", "nadam"),
        ("adamw", "adafactor"),
        ("sgd", "lars"),
        ("rmsprop", "sgd"),
        ("generalized_signsgd", "adamw"),
        ("soap", "adamw"),
        ("schedule_free_sgd", "schedule_free_adamw"),
    ],
)
def test_no_step_is_longer_than_after_a_fresh_start(name: str, other: str, scale: float) -> None:
    start, saved = trained(name, scale)
    longest = []
    for loads in (True, False):
        p = nn.Parameter(start.clone())
        optimizer = build(other, [p], engine="reference", **KEEPING.get(other, {}))
        if loads:
            with pytest.warns(UserWarning, match="which is another class"):
                optimizer.load_state_dict(copy.deepcopy(saved))
        steps = AFTER if other != "prodigy" else 3 * AFTER
        longest.append(stepped(optimizer, p, range(BEFORE, BEFORE + steps), scale))
    assert 0.5 * longest[1] <= longest[0] <= 2 * longest[1]


def continued(kind: Kind, folder: Path) -> list[float]:
    """The losses of NAdam from a checkpoint of AdamW on, which lacks the product of its momenta."""
    warnings.simplefilter("ignore")
    for name, resumes in (("adamw", None), ("nadam", folder / "saved.ckpt")):
        torch.manual_seed(0)
        module = Configured({"name": name, "lr": 0.01})
        fitting = trainer(strategy=strategy_of(kind), max_epochs=1 if resumes is None else 3)
        fitting.fit(module, batches(), ckpt_path=resumes)
        if resumes is None:
            fitting.save_checkpoint(folder / "saved.ckpt")
    return module.losses


def test_a_number_that_a_full_file_lacks_starts_fresh_under_fsdp2_too(tmp_path: Path) -> None:
    """FSDP2 hands the optimizer its own first value, as if the file had it."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "whole").mkdir()
    for losses in run_ranks(continued, "fsdp2 full", tmp_path / "whole"):
        assert losses == pytest.approx(continued("single", tmp_path / "alone"), rel=1e-5)
