"""Schedules as functions of the step: torch's own schedulers as oracle, and laws over all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_optim.config.schedule import read
from lightning_optim.errors import shown
from lightning_optim.training.lengths import Length, Timeline, read_length
from lightning_optim.training.shapes import SHAPES, Shape
from tests.harness.schedules import SPECS

TOTAL, EPOCH = 100, 10


def timeline(total: int = TOTAL) -> Timeline:
    return Timeline(lambda: total, lambda epochs: EPOCH * epochs)


def shape_of(spec: Any) -> Shape:
    shape = read(spec)
    assert shape is not None
    return shape


def factors(spec: Any, total: int = TOTAL) -> list[float]:
    shape, time = shape_of(spec), timeline(total)
    return [shape.at(step, time) for step in range(total)]


def momenta(spec: Any) -> list[float | None]:
    shape, time = shape_of(spec), timeline()
    return [shape.momentum_at(step, time) for step in range(TOTAL)]


def of_torch(make: Callable[[Any], Any]) -> tuple[list[float], list[float]]:
    """The rates and momenta of a scheduler of torch, at a learning rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler, rates, found = make(optimizer), [], []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        found.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    return rates, found


def after_linear(optimizer: Any, warmup: int, make: Callable[[Any, int], Any]) -> Any:
    """torch's linear warm-up, and then another scheduler."""
    first = lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    return lr_scheduler.SequentialLR(optimizer, [first, make(optimizer, warmup)], [warmup])


CYCLE: dict[str, Any] = {"max_lr": 1.0, "total_steps": TOTAL}
PARITY: list[tuple[dict[str, Any], Callable[[Any], Any]]] = [
    ({"name": "constant"}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    ({"name": "linear", "final": 0.1}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, TOTAL)),
    ({"name": "cosine", "final": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.1)),
    (
        {"name": "cosine", "warmup": 0.2},
        lambda o: after_linear(o, 20, lambda o, w: lr_scheduler.CosineAnnealingLR(o, TOTAL - w)),
    ),
    ({"name": "step", "every": 30}, lambda o: lr_scheduler.StepLR(o, 30)),
    ({"name": "step", "every": 0.07, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    ({"name": "step", "every": "3 epochs", "gamma": 2}, lambda o: lr_scheduler.StepLR(o, 30, 2.0)),
    (
        {"name": "multi_step", "milestones": [20, "5 epochs", 0.75], "gamma": 0.5},
        lambda o: lr_scheduler.MultiStepLR(o, [20, 50, 75], 0.5),
    ),
    ({"name": "exponential", "gamma": 0.97, "every": 1}, lambda o: lr_scheduler.ExponentialLR(o, 0.97)),
    ({"name": "exponential", "final": 0.25}, lambda o: lr_scheduler.ExponentialLR(o, 0.25 ** (1 / TOTAL))),
    (
        {"name": "exponential", "gamma": 0.97, "every": 1, "warmup_steps": 10},
        lambda o: after_linear(o, 10, lambda o, _: lr_scheduler.ExponentialLR(o, 0.97)),
    ),
    ({"name": "one_cycle", "momentum": [0.85, 0.95]}, lambda o: lr_scheduler.OneCycleLR(o, **CYCLE)),
    (
        {"name": "one_cycle", "momentum": [0.5, 0.75], "warmup": 0.234, "three_phase": True, "start": 0.5}
        | {"final": 0.1},
        lambda o: lr_scheduler.OneCycleLR(
            o, **CYCLE, pct_start=0.234, three_phase=True, base_momentum=0.5, max_momentum=0.75, div_factor=2,
            final_div_factor=5,
        ),
    ),
    (
        {"name": "one_cycle", "momentum": [0.85, 0.95], "warmup": 40, "anneal": "linear"},
        lambda o: lr_scheduler.OneCycleLR(o, **CYCLE, pct_start=0.4, anneal_strategy="linear"),
    ),
    ({"name": "cosine_restarts", "cycle": 0.1}, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10)),
    (
        {"name": "cosine_restarts", "cycle": 10, "multiplier": 2, "final": 0.1},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 2, 0.1),
    ),
    (
        {"name": "cosine_restarts", "cycle": "1 epoch", "multiplier": 3, "warmup_steps": 20},
        lambda o: after_linear(o, 20, lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 3)),
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize(("spec", "make"), PARITY, ids=lambda value: str(value)[:50] if isinstance(value, dict) else "")
def test_rates_are_those_of_torch(spec: dict[str, Any], make: Callable[[Any], Any]) -> None:
    rates, found = of_torch(make)
    assert factors(spec) == pytest.approx(rates, rel=1e-9, abs=1e-12)  # torch multiplies rates up, step by step
    if spec.get("momentum"):
        assert momenta(spec) == pytest.approx(found, rel=1e-9)
    else:
        assert set(momenta(spec)) == {None}


def test_every_schedule_of_torch_by_name_is_compared() -> None:
    assert {spec["name"] for spec, _ in PARITY} == {*SHAPES} - {"inverse_sqrt", "flat_linear", "plateau"}


every = pytest.mark.parametrize("name", SHAPES)


@every
def test_values_at_start_and_end(name: str) -> None:
    """The rate of the optimizer is the first after a warm-up, and the largest; `final` is approached."""
    found = factors(SPECS[name], 1000)
    start = 0.04 if name == "one_cycle" else 1.0
    assert found[0] == start
    assert max(found) == pytest.approx(1.0)
    ends = {"constant": 1, "inverse_sqrt": (0.01 / 1.01) ** 0.5, "step": 1e-3, "multi_step": 0.01, "exponential": 0.01}
    ends |= {"plateau": 1, "one_cycle": 4e-6}
    assert found[-1] == pytest.approx(ends.get(name, 0.0), rel=0.01, abs=6e-3)
    assert len(SPECS) == len(SHAPES)


@every
@pytest.mark.parametrize("total", [TOTAL, 137])
def test_a_warm_up_is_a_line_whatever_its_unit(name: str, total: int) -> None:
    fraction = factors({**SPECS[name], "warmup": 0.2}, total)
    steps = math.ceil(0.2 * total)
    if name != "one_cycle":
        assert fraction[:steps] == [(step + 1) / steps for step in range(steps)]
    if total == TOTAL:
        for same in ({"warmup": "20 %"}, {"warmup": "2 epochs"}, {"warmup": 20}, {"warmup_steps": 20}):
            assert factors({**SPECS[name], **same}) == fraction


@every
def test_the_defaults_follow_progress(name: str) -> None:
    """Training ten times as long goes through the same rates."""
    for one, other in zip(factors(SPECS[name], 100)[10:90], factors(SPECS[name], 1000)[100:900:10], strict=True):
        assert one == pytest.approx(other, rel=0.5 if name == "one_cycle" else 0.03, abs=0.03)


@every
def test_it_depends_on_the_step_alone(name: str) -> None:
    shape, time = shape_of({**SPECS[name], "warmup": 0.1}), timeline()
    order = [*range(0, TOTAL, 7), *range(TOTAL - 1, 0, -3)]
    whole = factors({**SPECS[name], "warmup": 0.1})
    assert [shape.at(step, time) for step in order] == [whole[step] for step in order]
    assert shape.at(TOTAL + 50, time) >= 0


@every
def test_what_needs_no_end_asks_for_none(name: str) -> None:
    def unknown(*_: Any) -> float:
        raise AssertionError("nobody knows")

    in_steps: dict[str, dict[str, Any]] = {
        "inverse_sqrt": {"timescale": 10},
        "step": {"every": 10},
        "multi_step": {"milestones": [10, 20]},
        "exponential": {"gamma": 0.5, "every": 3},
        "cosine_restarts": {"cycle": 10},
    }
    shape = shape_of({**SPECS[name], **in_steps.get(name, {}), "warmup": 5})
    if not shape.needs_end():
        assert all(shape.at(step, Timeline(unknown, unknown)) >= 0 for step in range(50))
    assert shape.needs_end() == (name in ("linear", "cosine", "flat_linear", "one_cycle"))


def test_falling_schedules_keep_their_least_factor() -> None:
    for spec in (
        {"name": "step", "every": 10, "final": 0.05},
        {"name": "multi_step", "milestones": [10, 20, 30], "final": 0.05},
        {"name": "exponential", "gamma": 0.5, "every": 10, "final": 0.05},
        {"name": "inverse_sqrt", "timescale": 1, "final": 0.5},
    ):
        found = factors(spec)
        assert found[-1] == spec["final"]
        assert all(one >= other for one, other in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("value", "length"),
    [
        (5, Length(5)),
        (500.0, Length(500)),
        (0, Length(0)),
        (0.25, Length(0.25, "fraction")),
        ("25 %", Length(0.25, "fraction")),
        ("1.5 epochs", Length(1.5, "epochs")),
        ("1 epoch", Length(1, "epochs")),
        ("7 steps", Length(7)),
        *((wrong, None) for wrong in (1.0, 2.0, 99.0)),  # steps, a fraction, or percent
        *((wrong, None) for wrong in (-1, 1.5, True, None, "5", "five epochs", "100 %", "-1 epochs", "1.5 steps", [5])),
        *((wrong, None) for wrong in (float("inf"), float("nan"), 10**5000, "1e400 epochs")),
    ],
    ids=shown,
)  # fmt: skip
def test_lengths_are_read(value: Any, length: Length | None) -> None:
    assert read_length(value) == length
    if length is not None:
        assert read_length(str(length) if length.unit == "epochs" else length) == length
