"""Lightning Fabric: what holds in a Trainer holds in a loop that Fabric sets up, under every strategy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_optim import OptimizerStrategy, ScheduleFreeAdamW, WeightAverage, create_optimizer
from tests.harness.fabrics import fabric_of
from tests.harness.ranks import run_ranks
from tests.harness.strategies import KINDS, Kind, rank, world_size
from tests.harness.worlds import whole

STEPS = 4
HALF = 2


class Net(nn.Module):
    """Layers with more than 4096 elements, so that 8 bits are 8 bits, and some that keep 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh())
        self.norm = nn.LayerNorm(70)
        self.head = nn.Linear(70, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))  # type: ignore[no-any-return]


class Ended(NamedTuple):
    """Weights of training, their average, and the norm of the last gradients."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    norm: float


def train(
    kind: Kind, spec: Any, steps: int = STEPS, save: Path | None = None, load: Path | None = None, begin: int = 0
) -> Ended:
    """Train to step number `steps`, saving there or going on from what another run has saved."""
    fabric = fabric_of(kind)
    net = Net()
    model: Any = fabric.setup_module(net)
    optimizer: Any = fabric.setup_optimizers(create_optimizer(spec, model))
    average = WeightAverage(optimizer, "ema", decay=0.5, start=2)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "average": average.state_dict()}
    if load:
        fabric.load(load, state)
        average.load_state_dict(state["average"])
    norm: Any = 0.0
    for step in range(begin, steps):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))[rank() :: world_size()]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :1].sin())
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.1)
        if optimizer.inputs:
            optimizer.set_loss(loss)
        optimizer.step()
    if save:
        with average.applied(model):
            fabric.save(save, {**state, "average": average.state_dict()})
    weights = whole(model._forward_module)
    with average.applied(model):
        return Ended(weights, whole(model._forward_module), float(norm))


# A previous gradient in 32 bits and moments in 8, norms over tensors, whole matrices, and the loss.
EIGHT_BITS = {"name": "adan", "state_bits": 8}
SPECS: dict[str, Any] = {"adan": EIGHT_BITS, "lamb": "lamb", "muon": "muon", "koala_v": "koala_v"}
# float32 sums in another order; with 8 bits a shard has other blocks, and so other roundings
TOLERANCES = {"adan": 1e-3, "lamb": 1e-6, "muon": 1e-6, "koala_v": 1e-6}


def whole_and_halves(kind: Kind, folder: Path) -> dict[str, tuple[Ended, Ended]]:
    """Each optimizer: a run in one piece, and one that was saved with the average in the model and went on."""
    found = {}
    for name, spec in SPECS.items():
        path = folder / f"{name}.ckpt"
        train(kind, spec, HALF, save=path)
        found[name] = train(kind, spec), train(kind, spec, load=path, begin=HALF)
    return found


@functools.cache
def alone(name: str) -> Ended:
    return train("single", SPECS[name])


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


SLOW = ("ddp", "fsdp1 sharded", "fsdp2 full")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.full) if k in SLOW else k for k in KINDS])
def test_it_trains_as_one_process_and_resumes_bit_for_bit(kind: Kind, tmp_path: Path) -> None:
    on_ranks = [whole_and_halves(kind, tmp_path)] if kind == "single" else run_ranks(whole_and_halves, kind, tmp_path)
    for name, (run, resumed) in on_ranks[0].items():
        assert furthest(run.weights, resumed.weights) == furthest(run.average, resumed.average) == 0, name
        assert furthest(run.weights, alone(name).weights) < TOLERANCES[name], name
        assert furthest(run.average, alone(name).average) < TOLERANCES[name], name
        assert furthest(run.average, run.weights) > 1e-4, name
        assert run.norm == pytest.approx(alone(name).norm, rel=1e-3)


def set_up(optimizer: torch.optim.Optimizer, net: nn.Module) -> tuple[Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    model: Any
    model, wrapped = fabric.setup(net, optimizer)
    assert wrapped is not optimizer
    return model, wrapped


def test_a_layer_that_joins_later_is_saved_in_its_place() -> None:
    """`zero_grad` of the wrapper lets it join, and what it counts anew belongs to the optimizer."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    optimizer = OptimizerStrategy("adamw").create(net)
    model, wrapped = set_up(optimizer, net)
    net[0].requires_grad_(True)
    wrapped.zero_grad()
    assert not optimizer.waiting
    model(torch.ones(1, 2)).sum().backward()
    wrapped.step()
    assert optimizer.model_order == OptimizerStrategy("adamw").create(net).model_order
    wrapped.consolidate_state_dict()
    saved = wrapped.optimizer.state_dict()["state"]
    shapes = [tuple(saved[i]["exp_avg"].shape) for i in range(4)]
    assert shapes == [(3, 2), (3,), (1, 3), (1,)]  # as the model has them


def test_schedule_free_changes_modes_by_the_wrapper() -> None:
    net = nn.Linear(2, 1)
    model, wrapped = set_up(ScheduleFreeAdamW(net.parameters(), lr=0.1), net)
    for _ in range(3):
        wrapped.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        wrapped.step()
    last = net.weight.clone()
    wrapped.eval()
    assert not wrapped.optimizer.is_training
    assert wrapped.optimizer.evaluated
    assert not torch.equal(net.weight, last)
    wrapped.train()
    assert torch.equal(net.weight, last)


def test_an_average_of_torchs_optimizer_in_fabric() -> None:
    net = nn.Linear(2, 1, bias=False)
    model, wrapped = set_up(torch.optim.SGD(net.parameters(), lr=0.1), net)
    average = WeightAverage(wrapped)
    seen = []
    for _ in range(3):
        wrapped.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        wrapped.step()
        seen.append(net.weight.detach().clone())
    with average.applied(model):
        assert torch.allclose(net.weight, torch.stack(seen).mean(0))
    assert torch.equal(net.weight, seen[-1])
