"""Parameters that are frozen when an optimizer is made join it when they are trained, as in torch.optim."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_optim import create_optimizer
from lightning_optim.callbacks import WarmupFreeSchedule
from lightning_optim.reports.memory import state_memory
from tests.harness.data import batches
from tests.harness.modules import Configured
from tests.harness.problems import NAMES, moving, train
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer


def network(frozen: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    net[:2].requires_grad_(not frozen)
    return net


@pytest.mark.parametrize("name", NAMES)
def test_they_move_with_the_options_of_their_role(name: str) -> None:
    net = network()
    optimizer: Any = create_optimizer({"name": name, "lr": 0.01, **moving(name)}, net)
    before = [p.detach().clone() for p in net[:2].parameters()]
    bytes_before = sum(entry.bytes for entry in state_memory(optimizer))
    train(net, optimizer, 2)
    assert all(map(torch.equal, before, net[:2].parameters()))
    assert all(p not in optimizer.state for p in net[:2].parameters())
    net.requires_grad_(True)
    train(net, optimizer, 2)
    assert not any(torch.equal(old, new) for old, new in zip(before, net[:2].parameters(), strict=True) if old.any())
    assert sum(entry.bytes for entry in state_memory(optimizer)) > bytes_before
    held = {p: group for group in optimizer.param_groups for p in group["params"]}
    whole = create_optimizer({"name": name, "lr": 0.01}, network(frozen=False))
    expected = {p.shape: group["weight_decay"] for group in whole.param_groups for p in group["params"]}
    assert {p.shape: held[p]["weight_decay"] for p in net.parameters()} == expected
    assert [float(optimizer.state[p]["step"]) for p in net.parameters()] == [2.0] * 4 + [4.0] * 2


@pytest.mark.parametrize("unfrozen", [True, False])
def test_a_run_that_was_saved_after_they_joined_goes_on(unfrozen: bool) -> None:
    net = network()
    optimizer: Any = create_optimizer("adamw", net)
    train(net, optimizer, 1)
    net.requires_grad_(True)
    train(net, optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    twin = network()
    other: Any = create_optimizer("adamw", twin)
    twin.requires_grad_(unfrozen)
    twin.load_state_dict(weights)
    bad = copy.deepcopy(saved)
    bad["state"][0]["exp_avg_sq"].fill_(-1.0)
    before = [group["params"] for group in other.param_groups]
    with pytest.raises(ValueError, match="never negative"):
        other.load_state_dict(bad)
    assert [group["params"] for group in other.param_groups] == before
    other.load_state_dict(saved)
    twin.requires_grad_(True)
    train(net, optimizer, 2)
    train(twin, other, 2)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_a_copy_remembers_who_waits() -> None:
    net, optimizer = copy.deepcopy((net := network(), create_optimizer("adamw", net)))
    net.requires_grad_(True)
    train(net, optimizer, 1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def equal_layers() -> nn.Sequential:
    """Layers of one size, whose moments nothing but their order tells apart, and a norm that comes first."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    net[:2].requires_grad_(False)
    return net


@pytest.mark.parametrize("name", NAMES)
def test_after_they_joined_the_order_is_that_of_the_model(name: str) -> None:
    net, twin = equal_layers(), equal_layers()
    optimizer: Any = create_optimizer(name, net)
    train(net, optimizer, 1)
    net.requires_grad_(True)
    train(net, optimizer, 2)
    twin.load_state_dict(net.state_dict())
    other: Any = create_optimizer(name, twin.requires_grad_(True))
    assert [group["name"] for group in other.param_groups] != [group["name"] for group in optimizer.param_groups]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 2)
    train(twin, other, 2)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


class Unfreezes(Callback):
    """Lets the norm of a network train from the fourth step on, and notes the rates of each step."""

    def __init__(self) -> None:
        self.rates: list[set[float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            pl_module.net[1].requires_grad_(True)  # type: ignore[index]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.rates.append({float(group["lr"]) for group in optimizer.param_groups})


def joined_by_a_role_of_its_own() -> nn.Sequential:
    """A network whose norm is frozen, and no other parameter has the role of its parameters."""
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 2, bias=False))
    net[1].requires_grad_(False)
    return net


class ScheduledByTorch(Configured):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def joined(kind: Kind, module: type[Configured], schedule: str | None, *callbacks: Callback) -> list[set[float]]:
    unfreezes, made = Unfreezes(), module({"name": "adamw", "schedule": schedule}, joined_by_a_role_of_its_own)
    fitting = trainer(unfreezes, *callbacks, strategy=strategy_of(kind), max_steps=6)
    fitting.fit(made, batches())
    groups = fitting.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    return unfreezes.rates


@pytest.mark.parametrize("module", [Configured, ScheduledByTorch])
@pytest.mark.parametrize("warm", [False, True])
def test_a_group_that_was_all_frozen_follows_the_schedule(module: type[Configured], warm: bool) -> None:
    callbacks = [WarmupFreeSchedule("linear", beta2=0.6)] if warm else []
    rates = joined("single", module, "cosine" if module is Configured else None, *callbacks)
    assert [len(found) for found in rates] == [1] * 6
    assert len(set.union(*rates)) == 6


def test_sharded_too() -> None:
    assert [len(found) for found in run_ranks(joined, "fsdp2 full", Configured, "cosine")[0]] == [1] * 6


def test_a_file_without_groups_that_were_all_frozen() -> None:
    """Earlier versions left such groups out."""
    net = joined_by_a_role_of_its_own()
    optimizer: Any = create_optimizer("adamw", net)
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = [group for group in saved["param_groups"] if group["params"]]
    other: Any = create_optimizer("adamw", net)
    bad = copy.deepcopy(saved)
    bad["state"][0]["step"] = torch.tensor(-1.0)
    with pytest.raises(ValueError, match="counter"):
        other.load_state_dict(bad)
    assert [len(group["params"]) for group in other.param_groups] == [2, 0]
    other.load_state_dict(saved)
    net[1].requires_grad_(True)
    train(net, other, 1)
    assert [len(group["params"]) for group in other.param_groups] == [2, 2]
    assert [float(other.state[p]["step"]) for p in net.parameters()] == [3.0, 1.0, 1.0, 3.0]


class Tuned(Configured):
    @property
    def backbone(self) -> nn.Module:
        return self.net[0]  # type: ignore[index,no-any-return]


def test_fine_tuning_callbacks_add_their_own_group() -> None:
    module = Tuned("adamw")
    weight = module.net[0].weight.detach().clone()  # type: ignore[index]
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-4, verbose=False)
    fitting = trainer(tuning, max_epochs=3)
    fitting.fit(module, batches())
    groups = fitting.optimizers[0].param_groups
    assert len(groups) == 3
    assert groups[-1]["lr"] == pytest.approx(2e-4)
    assert not torch.equal(module.net[0].weight, weight)  # type: ignore[index]
    assert not fitting.optimizers[0].waiting  # type: ignore[attr-defined]
