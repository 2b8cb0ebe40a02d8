"""An optimizer over layers that are initialized by their first batch trains as one that is made after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import AdamW, OptionError, create_optimizer
from lightning_optim.core.foreign_stages import attach
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.reports.memory import frozen_memory, model_memory, predicted_memory, state_memory
from lightning_optim.stages.average import Average
from lightning_optim.stages.lookahead import Lookahead
from lightning_optim.stages.noise import Noise
from tests.harness import problems
from tests.harness.problems import NAMES


def lazy_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LazyLinear(4))


def batch() -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


def trained(make: Any, stages: bool, initialized: bool, closures: bool) -> list[Tensor]:
    net = lazy_net()
    if initialized:
        torch.manual_seed(5)
        net(batch())
    optimizer = make(net.parameters())
    if stages:
        indices = global_indices(net.named_parameters(), optimizer)
        for stage in (Noise(indices), Lookahead(k=2), Average(start=2)):
            attach(stage, optimizer)
    repr(optimizer)
    optimizer.state_dict()
    torch.manual_seed(5)

    def closure() -> Any:
        optimizer.zero_grad()
        loss: Any = net(batch()).square().mean()
        loss.backward()
        if getattr(optimizer, "inputs", ()):
            optimizer.set_loss(loss.detach())
        return loss

    for _ in range(4):
        if closures:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    slots = [x for p in net.parameters() for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [*net.parameters(), *slots]


@pytest.mark.parametrize("closures", [False, True])
@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_lazy_layers_train_as_others(name: str, engine: str, closures: bool) -> None:
    def make(params: Any) -> Any:
        return problems.build(name, params, engine=engine)

    found, expected = (trained(make, False, initialized, closures) for initialized in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("closures", [False, True])
@pytest.mark.parametrize("make", [AdamW, torch.optim.AdamW])
def test_lazy_layers_train_beside_stages(make: Any, closures: bool) -> None:
    found, expected = (trained(make, True, initialized, closures) for initialized in (False, True))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("spec", ["adan", "lamb", "koala_v", "adafactor", {"name": "adamw", "state_bits": 8}])
def test_a_word_makes_an_optimizer_of_lazy_layers(spec: Any) -> None:
    net = lazy_net()
    optimizer = create_optimizer(spec, net)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_a_group_of_lazy_layers_joins() -> None:
    net = lazy_net()
    optimizer = AdamW(net[0].parameters())
    optimizer.add_param_group({"params": net[1].parameters()})
    net(batch()).sum().backward()
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in net.parameters())


def test_reports_leave_out_what_has_no_size() -> None:
    net = lazy_net()
    optimizer = AdamW(net[0].parameters())
    optimizer.add_param_group({"params": net[1].parameters()})
    assert predicted_memory(optimizer) == []
    assert state_memory(optimizer) == []
    assert len(model_memory(optimizer)) == 2
    assert frozen_memory([], {p: name for name, p in net.named_parameters()})[0].elements == 15


def test_state_for_lazy_layers_is_refused() -> None:
    net, other = lazy_net(), lazy_net()
    other(batch()).sum().backward()
    trained_optimizer = AdamW(other.parameters())
    trained_optimizer.step()
    optimizer = AdamW(net.parameters())
    with pytest.raises(OptionError, match=r"not initialized.* Load the model first, or call it once\."):
        optimizer.load_state_dict(trained_optimizer.state_dict())
    assert not optimizer.state
    net.load_state_dict(other.state_dict())
    optimizer.load_state_dict(trained_optimizer.state_dict())
    assert len(optimizer.state) == 4
