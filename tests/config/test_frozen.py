"""Parameters that are frozen when an optimizer is made join it when they are trained, as in torch.optim."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_optim import create_optimizer
from lightning_optim.reports.memory import state_memory
from tests.harness.data import batches
from tests.harness.modules import Configured
from tests.harness.problems import NAMES
from tests.harness.trainers import trainer


def network(frozen: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    net[:2].requires_grad_(not frozen)
    return net


def train(net: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        if optimizer.inputs:
            optimizer.set_loss(loss)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_they_move_with_the_options_of_their_role(name: str) -> None:
    net = network()
    optimizer: Any = create_optimizer({"name": name, "lr": 0.01}, net)
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


class Tuned(Configured):
    @property
    def backbone(self) -> nn.Module:
        return self.net[0]  # type: ignore[index]


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
