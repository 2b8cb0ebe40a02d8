"""Prodigy: one d for all parameters, whose estimate crosses tensors, groups, files and ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import OptionError, Prodigy, create_optimizer
from lightning_optim.core.optimizer import OPTIMIZERS
from tests.harness.driver import run
from tests.harness.nets import plain_net
from tests.optimizers.worked import inputs
from tests.oracles import ORACLES

FAST: dict[str, Any] = {"d0": 1e-3, "d_coef": 5.0}


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, seed: int, factor: float = 1.0) -> None:
    """A step on the gradients of a bowl, with noise."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.grad = factor * (p.detach() + 0.1 * noise)
    optimizer.step()


def d_of(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["d"])


# ---------------------------------------------------------------- d


@pytest.mark.parametrize("options", [{}, FAST, {**FAST, "safeguard_warmup": True}], ids=["defaults", "fast", "safe"])
@pytest.mark.parametrize("engine", ["reference", pytest.param("auto", marks=pytest.mark.engines)])
def test_d_is_that_of_the_oracle(options: dict[str, Any], engine: str) -> None:
    params, gradients = inputs("ABCv")
    found: list[float] = []
    expected: list[float] = []
    run(
        "prodigy",
        params,
        gradients * 7,
        engine=engine,
        after_step=lambda _, optimizer: found.append(d_of(optimizer)),
        **options,
    )
    ORACLES["prodigy"](params, gradients * 7, ds=expected, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found[-1] > 10 * found[0]


@pytest.mark.parametrize("lost", [math.nan, math.inf])
@pytest.mark.parametrize("engine", ["reference", "blocked", pytest.param("auto", marks=pytest.mark.engines)])
def test_d_survives_a_gradient_that_is_not_finite(lost: float, engine: str) -> None:
    params = leaves((3, 4), (5,))
    optimizer = Prodigy(params, engine=engine, **FAST)
    for seed in range(4):
        step(optimizer, seed)
    before = {name: float(optimizer.param_groups[0][name]) for name in ("d", "d_max", "d_numerator")}
    params[0].grad = torch.full((3, 4), lost, dtype=torch.float64)
    params[1].grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    assert {name: float(optimizer.param_groups[0][name]) for name in before} == before
    assert torch.isfinite(params[1]).all()


def test_gradients_of_zeros_keep_d_and_decay() -> None:
    params = leaves((3, 4))
    optimizer = Prodigy(params, weight_decay=0.1, d0=1e-2)
    step(optimizer, 0, factor=0.0)
    assert d_of(optimizer) == 1e-2
    torch.testing.assert_close(params[0].detach(), leaves((3, 4))[0].detach() * (1 - 1e-3), rtol=1e-15, atol=0)


def test_d_finds_the_distance_whatever_d0_is() -> None:
    ends = []
    for d0 in (1e-6, 1e-4):
        p = Parameter(torch.full((10,), 3.0, dtype=torch.float64))
        optimizer = Prodigy([p], d0=d0)
        for seed in range(400):
            step(optimizer, seed)
        assert float(p.detach().norm()) < 1.0
        ends.append(d_of(optimizer))
    assert 0.2 < ends[0] / ends[1] < 5


# ---------------------------------------------------------------- groups


def test_a_group_may_stand_still() -> None:
    """It neither moves nor decays, and the others go on as if it were not there."""
    params, alone = leaves((3, 4), (5,)), leaves((3, 4))
    optimizer = Prodigy([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], weight_decay=0.1, **FAST)
    lonely = Prodigy(alone, weight_decay=0.1, **FAST)
    for options in ({"safeguard_warmup": False}, {"safeguard_warmup": True}):
        for group in (*optimizer.param_groups, *lonely.param_groups):
            group.update(options)
        for seed in range(5):
            step(optimizer, seed)
            step(lonely, seed)
    assert torch.equal(params[1], leaves((3, 4), (5,))[1])
    assert torch.equal(params[0], alone[0])
    assert d_of(optimizer) == d_of(lonely) > 1e-3
    optimizer.param_groups[1]["lr"] = 1.0
    step(optimizer, 9)
    assert not torch.equal(params[1], leaves((3, 4), (5,))[1])


def test_several_learning_rates_are_refused() -> None:
    one, other = leaves((3,), (2,))
    words = r"Prodigy: its parameter groups have the learning rates 1.0, 0.1. It finds one step size.*the same lr, or 0"
    with pytest.raises(OptionError, match=words):
        Prodigy([{"params": [one]}, {"params": [other], "lr": 0.1}])
    optimizer = Prodigy([one])
    with pytest.raises(OptionError, match=words):
        optimizer.add_param_group({"params": [other], "lr": 0.1})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(OptionError, match="learning rates"):
        create_optimizer({"name": "prodigy", "groups": [{"params": "bias", "lr": 0.5}]}, plain_net())


def test_learning_rates_that_drift_apart_are_refused_in_the_step() -> None:
    """By a user or a schedule; the step has changed nothing, and schedules of all groups alike are served."""
    params = leaves((3,), (2,))
    optimizer = Prodigy([{"params": params[:1]}, {"params": params[1:]}], **FAST)
    together = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 4)
    for seed in range(3):
        step(optimizer, seed)
        together.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in params]
    apart = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5])
    with pytest.raises(OptionError, match=r"learning rates 1.0, 0.5"):
        step(optimizer, 5)
    assert apart.last_epoch == 0
    assert all(map(torch.equal, before, params))
    assert float(optimizer.state_dict()["param_groups"][0]["d"]) == float(state["param_groups"][0]["d"])
    assert [int(slots["step"]) for slots in optimizer.state_dict()["state"].values()] == [3, 3]


@pytest.mark.parametrize(
    "option", [{"betas": (0.8, 0.999)}, {"beta3": 0.5}, {"d0": 1e-3}, {"d_coef": 2.0}, {"growth_rate": 1.5}], ids=str
)
def test_what_the_estimate_is_made_with_is_one_for_all_groups(option: dict[str, Any]) -> None:
    one, other = leaves((3,), (2,))
    name = next(iter(option))
    with pytest.raises(OptionError, match=f"Prodigy: {name} is .* in its first parameter group and another in a later"):
        Prodigy([{"params": [one]}, {"params": [other], **option}])
    optimizer = Prodigy([{"params": [one]}, {"params": [other]}])
    step(optimizer, 0)
    optimizer.param_groups[1].update(option)
    with pytest.raises(OptionError, match=f"Prodigy: {name} is"):
        step(optimizer, 1)


def test_growth_rate_may_be_infinite_and_not_below_one() -> None:
    one, other = leaves((3, 4), (3, 4))
    with torch.no_grad():
        other.copy_(one)
    unlimited, infinite = Prodigy([one], **FAST), Prodigy([other], growth_rate=math.inf, **FAST)
    for seed in range(8):
        step(unlimited, seed)
        step(infinite, seed)
    assert torch.equal(one, other)
    for wrong in (0.9, math.nan, -math.inf):
        with pytest.raises(OptionError, match="growth_rate"):
            Prodigy([one], growth_rate=wrong)
    with pytest.raises(OptionError, match="d0"):
        Prodigy([one], d0=0.0)


# ---------------------------------------------------------------- files


def official(params: list[Parameter], steps: int, zero: int) -> dict[str, Any]:
    """A file as prodigyopt 1.1.2 writes it: numbers in each group, flat s and p0, and one 0 for the start of zeros."""
    optimizer = Prodigy(params, **FAST)
    starts = [p.detach().clone() for p in params]
    for seed in range(steps):
        step(optimizer, seed)
    own = {name: float(optimizer.param_groups[0][name]) for name in ("d", "d_max", "d_numerator")}
    state = {}
    for i, (p, start) in enumerate(zip(params, starts, strict=True)):
        slots = optimizer.state[p]
        flat: dict[str, Any] = {"s": slots["s"].flatten().clone(), "p0": start.flatten()}
        if i == zero:
            flat["p0"] = torch.tensor(0, dtype=p.dtype)
        state[i] = {"step": steps, **flat, **{name: slots[name].clone() for name in ("exp_avg", "exp_avg_sq")}}
    group = {
        **{"lr": 1.0, "betas": (0.9, 0.999), "beta3": None, "eps": 1e-8, "weight_decay": 0, **own, **FAST},
        **{"k": steps, "growth_rate": math.inf, "use_bias_correction": False, "decouple": True, "slice_p": 1},
        **{"safeguard_warmup": False, "fsdp_in_use": False, "d_denom": 1.0, "d_hat": own["d"]},
    }
    return {"state": state, "param_groups": [{**group, "params": [0, 1]}, {**group, "params": [2]}]}


@pytest.mark.filterwarnings("error")
def test_a_file_of_the_authors_program_goes_on() -> None:
    params = leaves((3, 4), (2, 2), ())
    with torch.no_grad():
        params[1].zero_()
    saved = official(params, 5, zero=1)
    others = [Parameter(p.detach().clone()) for p in params]
    optimizer = Prodigy([{"params": others[:2]}, {"params": others[2:]}], lr=0.5, eps=1e-3)
    optimizer.load_state_dict(saved)
    whole = leaves((3, 4), (2, 2), ())
    with torch.no_grad():
        whole[1].zero_()
    unbroken = Prodigy([{"params": whole[:2]}, {"params": whole[2:]}], **FAST)
    for seed in range(10):
        step(unbroken, seed)
        if seed >= 5:
            step(optimizer, seed)
    assert all(map(torch.equal, others, whole))
    assert d_of(optimizer) == d_of(unbroken)
    assert not {"k", "d_hat", "decouple"} & optimizer.param_groups[0].keys()
    assert "d" not in optimizer.param_groups[1]


def test_slices_of_the_authors_program_are_refused() -> None:
    params = leaves((3, 4), (2, 2), ())
    saved = official(params, 2, zero=1)
    saved["state"][0]["s"] = saved["state"][0]["s"][::2]
    with pytest.raises(OptionError, match="cannot load s of shape"):
        Prodigy([{"params": params[:2]}, {"params": params[2:]}]).load_state_dict(saved)


def test_a_file_with_several_rates_is_refused_before_anything_changes() -> None:
    params = leaves((3,), (2,))
    optimizer = Prodigy([{"params": params[:1]}, {"params": params[1:]}])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["lr"] = 0.25
    with pytest.raises(OptionError, match=r"learning rates 1.0, 0.25"):
        optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize(
    "theirs",
    [
        {},
        {"d0": 1e-3, "weight_decay": 0.1},
        {"d0": 1e-3, "weight_decay": 0.1, "decouple": False},
        {"d0": 1e-3, "use_bias_correction": True, "growth_rate": 1.3, "d_coef": 5.0},
        {"d0": 1e-3, "safeguard_warmup": True, "use_bias_correction": True, "betas": (0.9, 0.99)},
    ],
    ids=["defaults", "decay", "coupled", "growth", "safeguard"],
)
def test_equals_prodigyopt(theirs: dict[str, Any]) -> None:
    prodigyopt = pytest.importorskip("prodigyopt")
    mine, others = leaves((3, 4), (5,), (2, 3, 2)), leaves((3, 4), (5,), (2, 3, 2))
    own = {"decoupled" if key == "decouple" else key: value for key, value in theirs.items()}
    ours: Any = OPTIMIZERS["prodigy"](mine, **own)
    official = prodigyopt.Prodigy(others, **theirs)
    for seed in range(50):
        step(ours, seed)
        step(official, seed)
        for p, q in zip(mine, others, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-10)
    assert d_of(ours) == pytest.approx(official.param_groups[0]["d"], rel=1e-10)


def test_p0_and_s_are_exact_in_8_bits() -> None:
    p = leaves((70, 61), dtype=torch.float32)[0]
    start = p.detach().clone()
    optimizer = Prodigy([p], state_bits=8)
    step(optimizer, 0)
    held: dict[str, Tensor] = optimizer.state[p]
    assert torch.equal(held["p0"], start)
    assert held["s"].dtype == torch.float32
