"""The average of the weights in a loop without a Trainer, against arithmetic by hand and against the callback."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import AdamW, OptionError, ScheduleFreeSGD, WeightAverage
from tests.harness.nets import plain_net

Make = Any


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.05)


def ours(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.05)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[Tensor]:
    """The weights after each step from number `first` to `last`."""
    found = []
    for step in range(first, last + 1):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()
        found.append(weights(model))
    return found


def by_hand(walk: list[Tensor], kind: str) -> Tensor:
    if kind == "mean":
        return torch.stack(walk).mean(0)
    powers = [0.8 ** (len(walk) - 1 - i) * (0.2 if i or kind == "ema_debiased" else 1.0) for i in range(len(walk))]
    total = 1 - 0.8 ** len(walk) if kind == "ema_debiased" else 1.0
    return torch.stack([weight * x for weight, x in zip(powers, walk, strict=True)]).sum(0) / total


@pytest.mark.parametrize("make", [ours, torchs])
@pytest.mark.parametrize("kind", ["mean", "ema", "ema_debiased"])
def test_it_is_the_average(make: Make, kind: Any) -> None:
    torch.manual_seed(0)
    model = plain_net()
    optimizer = make(model.parameters())
    average = WeightAverage(optimizer, kind, decay=0.8, start=3, every=2)
    walk = steps(model, optimizer, 1, 8)
    assert average.count == 3
    with average.applied(model):
        assert torch.allclose(weights(model), by_hand([walk[2], walk[4], walk[6]], kind), atol=1e-6)
    assert torch.equal(weights(model), walk[-1])


def test_before_the_first_collection_the_model_stays() -> None:
    model = plain_net()
    average = WeightAverage(AdamW(model.parameters()), start=5)
    before = weights(model)
    with average.applied(model), average.applied(model):
        assert torch.equal(weights(model), before)


def test_on_call() -> None:
    model = plain_net()
    optimizer = AdamW(model.parameters(), lr=0.05)
    average = WeightAverage(optimizer, every=None)
    walk = []
    for epoch in range(3):
        walk.append(steps(model, optimizer, 4 * epoch, 4 * epoch + 3)[-1])
        average.collect()
    with average.applied(model):
        assert torch.allclose(weights(model), torch.stack(walk).mean(0), atol=1e-6)


@pytest.mark.parametrize("make", [ours, torchs])
@pytest.mark.parametrize("inside", [False, True])
def test_a_loop_that_goes_on_from_a_file_repeats_its_bits(make: Make, inside: bool) -> None:
    """Saved with the weights of training in the model, or with the average."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage]:
        torch.manual_seed(0)
        model = plain_net()
        optimizer = make(model.parameters())
        return model, optimizer, WeightAverage(optimizer, "ema", decay=0.8)

    def state(*parts: Any) -> Any:
        return copy.deepcopy([part.state_dict() for part in parts])

    whole = fresh()
    steps(*whole[:2], 1, 3)
    if inside:
        with whole[2].applied(whole[0]):
            saved = state(*whole)
    else:
        saved = state(*whole)
    end = steps(*whole[:2], 4, 6)[-1]
    again = fresh()
    parts: tuple[Any, ...] = again
    for part, own in zip(parts, saved, strict=True):
        part.load_state_dict(own)
    assert torch.equal(steps(*again[:2], 4, 6)[-1], end)
    with whole[2].applied(whole[0]), again[2].applied(again[0]):
        assert torch.equal(weights(whole[0]), weights(again[0]))


def test_weights_in_sixteen_bits_come_back_bit_for_bit() -> None:
    model = plain_net().bfloat16()
    optimizer = AdamW(model.parameters(), lr=0.05)
    average = WeightAverage(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
    last = weights(model)
    with average.applied(model):
        assert not torch.equal(weights(model), last)
    assert torch.equal(weights(model), last)
    assert all("raw" not in state for state in optimizer.state.values())


def test_after_detach_nothing_is_collected() -> None:
    model = plain_net()
    optimizer = AdamW(model.parameters())
    average = WeightAverage(optimizer)
    steps(model, optimizer, 1, 2)
    average.detach()
    steps(model, optimizer, 3, 3)
    assert average.count == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "median"}, r"kind='median' must be 'mean', 'ema' or 'ema_debiased'\."),
        ({"decay": 1}, r"decay=1 must be in \(0, 1\)\."),
        ({"start": 0.75}, r"start=0\.75 must be an integer of at least 0\."),
        ({"every": "epoch"}, r"every='epoch' must be an integer of at least 1, or None\."),
        ({"kind": "ema", "window": 3}, r"window=3 must be .* with kind='mean'\."),
        ({"ramp": True}, r"ramp=True must be False, except with kind='ema'\."),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=f"WeightAverage: {said}"):
        WeightAverage(AdamW(plain_net().parameters()), **options)


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match=r"ScheduleFreeSGD averages its weights itself: call its eval\(\)"):
        WeightAverage(ScheduleFreeSGD(plain_net().parameters(), lr=0.1))
    optimizer = AdamW(plain_net().parameters())
    average = WeightAverage(optimizer)
    with pytest.raises(OptionError, match="has a stage named 'average' already"):
        WeightAverage(optimizer)
    other = WeightAverage(AdamW(plain_net().parameters()), "ema")
    with pytest.raises(OptionError, match=r"the file holds an average with kind='mean' and this one has 'ema'\. Set"):
        other.load_state_dict(average.state_dict())
