"""What `torch.distributed.checkpoint.state_dict` gets of an optimizer goes on, in a fresh one, as the run does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lightning_optim.core.optimizer import OPTIMIZERS
from tests.harness.problems import NAMES, train


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_goes_on(name: str, flat: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    twin = copy.deepcopy(net)
    other = OPTIMIZERS[name](twin.parameters())
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    train(net, optimizer, 2)
    train(twin, other, 2)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
