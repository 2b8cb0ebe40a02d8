"""Recipes: a word brings an optimizer with settings, and its callbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_optim import AdamW, OptimizerStrategy, Padam, RAdam
from lightning_optim.callbacks import IterateAveraging, LookaheadSync
from lightning_optim.config.recipes import RECIPES
from lightning_optim.stages import Average
from tests.harness.data import batches
from tests.harness.modules import Configured
from tests.harness.trainers import trainer
from tests.optimizers.goldens import AVERAGES, GOLDENS


def fit(spec: Any, callbacks: list[Callback]) -> Trainer:
    found = trainer(*callbacks, max_epochs=4)
    found.fit(Configured(spec), batches())
    return found


@pytest.mark.parametrize(
    ("name", "optimizer", "callback", "slot"),
    [
        ("gadam", AdamW, IterateAveraging, "average"),
        ("gadamx", Padam, IterateAveraging, "average"),
        ("ranger", RAdam, LookaheadSync, "slow"),
    ],
)
def test_a_recipe_brings_its_callback(name: str, optimizer: type, callback: type[Callback], slot: str) -> None:
    fitted = fit(name, [])
    assert [type(found) for found in fitted.callbacks if isinstance(found, callback)] == [callback]  # type: ignore[attr-defined]
    (made,) = fitted.optimizers
    assert type(made) is optimizer
    assert all(slot in state for state in made.state.values())


def test_the_users_callback_wins() -> None:
    mine = IterateAveraging("ema", decay=0.5)
    fitted = fit("gadam", [mine])
    assert [found for found in fitted.callbacks if isinstance(found, IterateAveraging)] == [mine]  # type: ignore[attr-defined]


def test_settings_of_a_recipe_hold_unless_changed() -> None:
    (group,) = OptimizerStrategy.parse("gadamx").create([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["partial"], group["decoupled"], group["amsgrad"]) == (0.125, True, True)
    (group,) = OptimizerStrategy.parse("gadamx", partial=0.25).create([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["partial"], group["decoupled"]) == (0.25, True)


@pytest.mark.parametrize("name", ["gadam", "gadamx"])
def test_the_mean_of_a_recipe_is_the_published_one(name: str) -> None:
    """The golden means, collected after each step from the first on."""
    golden = next(golden for golden in GOLDENS if golden.name == f"{name}_iterates")
    params = [nn.Parameter(torch.tensor(p)) for p in golden.initial()]
    optimizer = OptimizerStrategy.parse(name, **golden.options).create(params)
    optimizer.append(Average("mean", start=1))
    for grads, means in zip(golden.gradient_steps(), AVERAGES[f"{name}_average_after_each_step"], strict=True):
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.tensor(grad)
        optimizer.step()
        found = torch.cat([optimizer.state[p]["average"].flatten() for p in params])
        expected = torch.tensor(means, dtype=torch.float64).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert RECIPES[name].callbacks
