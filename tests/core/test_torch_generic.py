"""What torch's own tests ask of every optimizer, asked of ours with torch's own machinery.

The inputs come from `torch.testing._internal.common_optimizers`: an `OptimizerInfo` per optimizer says what to build it
with and what it can do. For the optimizers that torch has too, these are torch's own inputs. What torch tests and we
have no word for (foreach, fused, capturable, differentiable, sparse, several devices) is left out.
"""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from tests.harness.problems import NAMES, flat, make_params

pytest.importorskip("expecttest", reason="torch's test machinery needs expecttest")


def machinery() -> ModuleType:
    """torch's test machinery, without what importing it does to the process: a hypothesis profile, frozen flags."""
    profile = hypothesis.settings.get_current_profile_name()
    module = importlib.import_module("torch.testing._internal.common_optimizers")
    hypothesis.settings.load_profile(profile)
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    return module


TORCH = machinery()

# Settings beside those that every optimizer gets below: each switches something on that changes the step.
MORE: dict[str, tuple[dict[str, Any], ...]] = {
    "acprop": (
        {"amsgrad": True},
        {"rectify": True},
        {"momentum_update": True},
        {"ratio_clip": 1.0, "decoupled": False},
    ),
    "adabelief": ({"rectify": False}, {"amsgrad": True, "decoupled": False}),
    "adafactor": (
        {"mode": "paper", "beta1": 0.9},
        {"mode": "paper", "relative_step": False, "scale_parameter": False, "lr": 1e-3},
        {"factor_axes": "two_largest"},
        {"factored": False},
    ),
    "ademamix": ({"t_alpha": 20.0, "t_beta3": 20.0},),
    "adopt": ({"clip_power": None}, {"decoupled": False, "weight_decay": 0.1}),
    "adan": ({"max_grad_norm": 0.5}, {"no_prox": True, "weight_decay": 0.1}),
    "adapnm": ({"amsgrad": False}, {"decoupled": False, "weight_decay": 0.1}),
    "generalized_signsgd": ({"use_bias_correction": True}, {"decoupled": True, "weight_decay": 0.1}),
    "koala_m": ({"r": 1.0}, {"loss_target": 0.1}),
    "koala_v": ({"r": 1.0}, {"wd_in_direction": False, "weight_decay": 0.1}),
    "lamb": ({"max_grad_norm": 0.5}, {"bias_correction": False}, {"phi": (0.1, 5.0), "always_adapt": True}),
    "lars": ({"nesterov": True}, {"momentum": 0.0}, {"trust_clip": True, "lr_inside_buffer": False}),
    "mars": ({"optimize_1d": True}, {"gamma": 0.5}),
    "moment_estimation_sgd": ({"scope": "tensor"}, {"init": 1.0, "delayed": False}),
    "nadam": ({"momentum_decay": None}, {"momentum_decay": None, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "muon": ({"nesterov": False, "adjust": "original"}, {"matrix": False}),
    "padam": ({"debias": "consistent"}, {"amsgrad": False, "partial": 0.5}, {"decoupled": True, "weight_decay": 0.1}),
    "pnm": ({"decoupled": False, "weight_decay": 0.1},),
    "prodigy": ({"use_bias_correction": True, "growth_rate": 1.5}, {"decoupled": False, "weight_decay": 0.1}),
    "radam": ({"fallback": "skip"},),
    "rmsprop": ({"tf_style": True, "momentum": 0.9}, {"eps_in_sqrt": True}),
    "scalar_rmsprop": ({"scope": "tensor", "debias": True}, {"normalize_by_dim": True, "decoupled": False}),
    "sgdw": ({"nesterov": True}, {"momentum": 0.0}, {"dampening": 0.5}),
}


def info_of(name: str) -> Any:
    """What torch's machinery wants to know of an optimizer."""
    cls = OPTIMIZERS[name]

    def usual(device: str) -> list[Any]:
        kwargs = [{}, {"lr": cls.options["lr"].default / 2}, {"weight_decay": 0.1}]
        kwargs += [] if cls.inputs else [{"weight_decay": 0.1, "maximize": True}]
        return [TORCH.OptimizerInput(params=None, kwargs=each) for each in kwargs]

    def inputs(device: str, dtype: torch.dtype | None = None) -> list[Any]:
        own = [{"engine": "reference"}, {"state_bits": 16}, *MORE.get(name, ())]
        own = [TORCH.OptimizerInput(params=None, kwargs=each) for each in own]
        return [*getattr(TORCH, f"optim_inputs_func_{theirs}", usual)(device), *own]

    theirs = "" if name == "muon" else name  # torch's has other options, and no AdamW
    errors = getattr(TORCH, f"optim_error_inputs_func_{theirs}", TORCH.get_error_inputs_for_all_optims)
    return TORCH.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=([lambda o: lr_scheduler.StepLR(o, 10, 0.9), lr_scheduler.ReduceLROnPlateau],),
        supported_impls=(),
        supports_complex=not cls.real_only,
        step_requires_closure=bool(cls.inputs),
    )


INFOS = {name: info_of(name) for name in NAMES}
every_optimizer = pytest.mark.parametrize("info", list(INFOS.values()), ids=lambda info: info.name)
COMPLEX = [info for info in INFOS.values() if info.supports_complex]


def inputs_of(info: Any) -> list[Any]:
    """All settings to build an optimizer with, the defaults first."""
    return list(TORCH._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info))


def few_inputs_of(info: Any) -> list[Any]:
    """The defaults and one setting that changes the step, where the arithmetic is not what is tested."""
    return inputs_of(info)[:: len(inputs_of(info)) - 1]


def rate_beside(info: Any, given: Any, rate: float) -> float:
    """The rate of a second group: another than that of the first, where an optimizer takes more than one."""
    own: float = given.kwargs.get("lr", info.optim_cls.options["lr"].default)
    return own if info.optim_cls.__name__ == "Prodigy" else rate


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.Parameter(values.to(dtype))


class Linear:
    """torch's usual test problem: the squares of a linear map, summed."""

    def __init__(self, contiguous: bool = True, dtype: torch.dtype = torch.float32) -> None:
        if contiguous:
            self.weight, self.bias = leaf(10, 5, dtype=dtype), leaf(10, dtype=dtype, seed=1)
        else:
            self.weight = torch.nn.Parameter(leaf(10, 5, 2, dtype=dtype).detach()[..., 0])
            self.bias = torch.nn.Parameter(leaf(10, 2, dtype=dtype, seed=1).detach()[..., 0])
        self.input = leaf(5, dtype=dtype, seed=2).detach()
        self.params = [self.weight, self.bias]

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def evaluate() -> Any:
            optimizer.zero_grad()
            loss: Any = (self.weight.mv(self.input) + self.bias).pow(2).sum()
            loss.backward()
            return loss

        return evaluate


def step(optimizer: Any, params: Sequence[Tensor], seed: int, zero: bool = False, first: int = 0) -> None:
    """One step along the gradients of a seed, one for each place from `first` on, with a loss for who reads it."""

    def closure() -> float:
        for place, p in enumerate(params, start=first):
            generator = torch.Generator().manual_seed(100 * seed + place)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if zero:
                p.grad.zero_()
        return 1.0 / (1 + seed)

    optimizer.step(closure)


def steps(optimizer: Any, params: Sequence[Tensor], count: int, skip: int = 0, first: int = 0) -> None:
    for seed in range(skip, skip + count):
        step(optimizer, params, seed, first=first)


def same_state(one: Any, other: Any) -> bool:
    """Whether two state_dicts hold the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


# ---------------------------------------------------------------------------------------------- construction


@every_optimizer
def test_errors(info: Any) -> None:
    """Whatever torch refuses when it builds an optimizer is refused, as a ValueError and a TypeError at once.

    Except two tensors for betas or one of them: an option that is a number takes any tensor of one element.
    """
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        given, params = error.optimizer_error_input, error.optimizer_error_input.params
        if given.desc == "betas must be either both floats or both Tensors":
            continue
        with pytest.raises((ValueError, TypeError)):
            info.optim_cls([leaf(2, 3)] if params is None else params, **given.kwargs)


@every_optimizer
def test_every_default_is_in_each_group(info: Any) -> None:
    """But for the engine, which runs all groups at once, and for what else is one for all groups."""
    for given in inputs_of(info):
        rate = rate_beside(info, given, 0.5)
        optimizer = info.optim_cls([{"params": [leaf(2)]}, {"params": [leaf(3)], "lr": rate}], **given.kwargs)
        assert optimizer.defaults.keys() == info.optim_cls.options.keys()
        for group in optimizer.param_groups:
            mode = {"train_mode"} if optimizer.evaluates() else set()
            assert group.keys() == {"params", *optimizer.defaults, *mode} - {"engine", "capturable", "owners"}
        assert [group["lr"] for group in optimizer.param_groups] == [optimizer.defaults["lr"], rate]
        optimizer.add_param_group({"params": [leaf(4)]})
        assert optimizer.param_groups[2]["lr"] == optimizer.defaults["lr"]
        for key, value in given.kwargs.items():
            assert optimizer.defaults[key] == value


@every_optimizer
def test_can_be_printed(info: Any) -> None:
    for given in inputs_of(info):
        text = repr(info.optim_cls([leaf(2)], **given.kwargs))
        assert text.startswith(f"{info.name} (")
        assert all(f"{key}: " in text for key in given.kwargs)


# ---------------------------------------------------------------------------------------------- direction


@every_optimizer
@pytest.mark.parametrize(("contiguous", "scheduled"), [(True, False), (False, True)])
def test_goes_in_the_right_direction(info: Any, contiguous: bool, scheduled: bool) -> None:
    for given in (few_inputs_of if scheduled else inputs_of)(info):
        problem = Linear(contiguous)
        optimizer = info.optim_cls(problem.params, **given.kwargs)
        closure = problem.closure(optimizer)
        schedulers = [make(optimizer) for make in info.scheduler_inputs[0]] if scheduled else []
        first = closure().item()
        for _ in range(12):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step(*([loss.detach()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        last = closure().item()
        assert last > first if given.kwargs.get("maximize") else last < first


@every_optimizer
def test_decay_of_one_group_only(info: Any) -> None:
    """A group with decay and none without: the loss falls for both, and the groups do not mix their options."""
    for given in few_inputs_of(info):
        if given.kwargs.get("maximize"):
            continue
        problem = Linear()
        groups = [{"params": [problem.weight], "weight_decay": 0.5}, {"params": [problem.bias], "weight_decay": 0.0}]
        optimizer = info.optim_cls(groups, **given.kwargs)
        closure = problem.closure(optimizer)
        first = closure().item()
        for _ in range(12):
            optimizer.step(closure)
        assert closure().item() < first
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


@every_optimizer
def test_a_group_with_rate_zero_stands_still(info: Any) -> None:
    for given in inputs_of(info):
        problem = Linear()
        weight = problem.weight.detach().clone()
        optimizer = info.optim_cls(
            [{"params": [problem.weight], "lr": 0.0}, {"params": [problem.bias]}], **given.kwargs
        )
        closure = problem.closure(optimizer)
        bias = problem.bias.detach().clone()
        for _ in range(7):  # from the sixth on RAdam moves without its fallback too
            optimizer.step(closure)
        assert torch.equal(problem.weight.detach(), weight)
        assert not torch.equal(problem.bias.detach(), bias)


@pytest.mark.parametrize("name", NAMES)
def test_recommended_settings_train(name: str) -> None:
    """150 steps at the recommended settings at least halve the loss of a small linear regression."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.1 * torch.randn(6, 8, generator=generator))
    bias = torch.nn.Parameter(torch.zeros(6))
    inputs = torch.randn(64, 8, generator=generator)
    targets = 0.1 * (inputs @ torch.randn(8, 6, generator=generator) + torch.randn(6, generator=generator))
    optimizer: Any = OPTIMIZERS[name]([weight, bias], **OPTIMIZERS[name].recommended)

    def closure() -> Any:
        optimizer.zero_grad()
        loss: Any = (inputs @ weight.t() + bias - targets).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(150):
        optimizer.step(closure)
    assert closure().item() < first / 2


# ---------------------------------------------------------------------------------------------- gradients


@every_optimizer
def test_does_nothing_where_no_gradient_is(info: Any) -> None:
    for given in inputs_of(info):
        params = [leaf(2, 3), leaf(5, seed=1)]
        before = [p.detach().clone() for p in params]
        optimizer = info.optim_cls(params, **given.kwargs)
        optimizer.step(lambda: 1.0)
        assert all(map(torch.equal, [p.detach() for p in params], before))
        assert all(p.grad is None for p in params)


@every_optimizer
def test_does_nothing_along_zero_gradients(info: Any) -> None:
    """Where nothing decays; state is kept all the same."""
    for given in inputs_of(info):
        params = [leaf(2, 3), leaf(5, seed=1)]
        before = [p.detach().clone() for p in params]
        still = dict.fromkeys({"weight_decay", "weight_decay_1d"} & info.optim_cls.options.keys(), 0.0)
        optimizer = info.optim_cls(params, **{**given.kwargs, **still})
        for _ in range(7):
            step(optimizer, params, 0, zero=True)
        assert all(map(torch.equal, [p.detach() for p in params], before))
        assert all(int(optimizer.state[p]["step"]) == 7 for p in params)


@every_optimizer
def test_every_tensor_with_a_gradient_has_state(info: Any) -> None:
    for given in inputs_of(info):
        params = [leaf(2, 3), leaf(5, seed=1)]
        optimizer = info.optim_cls(params, **given.kwargs)
        step(optimizer, params, 0)
        assert all(optimizer.state[p] for p in params)


@every_optimizer
def test_a_tensor_that_never_gets_a_gradient_is_left_alone(info: Any) -> None:
    """And changes nothing for the others, whose run is the one without it."""
    for given in inputs_of(info):
        params, alone, frozen = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)], leaf(4, 4, seed=2)
        before = frozen.detach().clone()
        optimizer, other = info.optim_cls([*params, frozen], **given.kwargs), info.optim_cls(alone, **given.kwargs)
        steps(optimizer, params, 4)
        steps(other, alone, 4)
        assert torch.equal(frozen.detach(), before)
        if info.name != "KoalaM":  # it measures how far all weights are from their average
            assert torch.equal(flat(params), flat(alone))


@every_optimizer
def test_empty_gradients(info: Any) -> None:
    """Tensors without elements take part, and change nothing for the others."""
    for given in inputs_of(info):
        params, alone = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)]
        empty = [leaf(0), leaf(0, 3), leaf(2, 0), leaf(2, 0, 3)]
        optimizer, other = info.optim_cls([*params, *empty], **given.kwargs), info.optim_cls(alone, **given.kwargs)
        steps(optimizer, [*params, *empty], 4)
        steps(other, alone, 4)
        assert torch.equal(flat(params), flat(alone))
        assert all(int(optimizer.state[p]["step"]) == 4 for p in empty)


@every_optimizer
def test_sparse_gradients_are_refused(info: Any) -> None:
    p = leaf(3, 2)
    p.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradient.*SparseAdam"):
        info.optim_cls([p]).step(lambda: 1.0)


@every_optimizer
def test_step_returns_the_loss_of_the_closure(info: Any) -> None:
    """Which it calls once, with gradients switched on."""
    problem = Linear()
    optimizer = info.optim_cls(problem.params)
    evaluate, called = problem.closure(optimizer), []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        called.append(evaluate())
        return called[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is called[0]
    assert len(called) == 1
    if not info.step_requires_closure:
        assert optimizer.step() is None


# ---------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("info", COMPLEX, ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_tensor_is_its_real_view(info: Any, dtype: torch.dtype) -> None:
    for given in inputs_of(info):
        if "state_bits" in given.kwargs:  # complex tensors keep state of their own type
            continue
        generator = torch.Generator().manual_seed(0)
        number = torch.nn.Parameter(torch.randn(5, 5, generator=generator, dtype=dtype))
        pair = torch.nn.Parameter(torch.view_as_real(number.detach()).clone())
        optimizer, other = info.optim_cls([number], **given.kwargs), info.optim_cls([pair], **given.kwargs)
        for _ in range(7):
            number.grad = torch.randn(5, 5, generator=generator, dtype=dtype)
            pair.grad = torch.view_as_real(number.grad).clone()
            optimizer.step()
            other.step()
            assert torch.equal(torch.view_as_real(number.detach()), pair.detach()), given.desc
        for name, value in optimizer.state[number].items():
            if value.is_complex():
                assert torch.equal(torch.view_as_real(value), other.state[pair][name])


@pytest.mark.parametrize("info", COMPLEX, ids=lambda info: info.name)
def test_a_complex_tensor_is_its_two_parts_where_no_norm_is_taken(info: Any) -> None:
    for given in inputs_of(info):
        number = torch.nn.Parameter(torch.complex(leaf(4).detach(), leaf(4, seed=1).detach()))
        parts = [leaf(4), leaf(4, seed=1)]
        options = {**given.kwargs, "lr": min(given.kwargs.get("lr") or info.optim_cls.options["lr"].default, 0.01)}
        optimizer, other = info.optim_cls([number], **options), info.optim_cls(parts, **options)
        if "state_bits" in given.kwargs or any(program.reductions for program in other.first_programs()):
            continue
        for _ in range(7):
            for p in (number, *parts):
                p.grad = None
            for x in (number, torch.complex(parts[0], parts[1])):
                loss: Any = x.mul(x).sub(2).abs().square().sum()
                loss.backward()
            optimizer.step()
            other.step()
            torch.testing.assert_close(number.detach(), torch.complex(parts[0].detach(), parts[1].detach()))


@pytest.mark.parametrize("info", [info for info in INFOS.values() if not info.supports_complex], ids=lambda i: i.name)
def test_complex_parameters_are_refused_with_a_reason(info: Any) -> None:
    with pytest.raises(TypeError, match=f"{info.name} cannot serve a complex parameter: "):
        info.optim_cls([leaf(2), torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = info.optim_cls([leaf(2)])
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_one_group_holds_several_dtypes(info: Any) -> None:
    """Each tensor steps in its own; where nothing sums over all tensors, as if it were alone."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

    def mixed() -> list[Tensor]:
        return [leaf(3, 4, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]

    for given in inputs_of(info):
        together, slow, alone = mixed(), mixed(), mixed()
        optimizer = info.optim_cls(together, **given.kwargs)
        steps(optimizer, together, 4)
        steps(info.optim_cls(slow, **{**given.kwargs, "engine": "reference"}), slow, 4)
        over_all = any("all tensors" in need for program in optimizer.first_programs() for need in program.needs)
        for place, p in enumerate(together):
            assert p.dtype == dtypes[place]
            assert torch.isfinite(p).all()
            torch.testing.assert_close(p, slow[place])
            if not over_all:
                steps(
                    info.optim_cls(alone[place : place + 1], **given.kwargs), alone[place : place + 1], 4, first=place
                )
                torch.testing.assert_close(p, alone[place])


@every_optimizer
def test_a_default_dtype_changes_nothing(info: Any) -> None:
    """Neither the iterates nor what the counters are kept in when a checkpoint is read back."""
    params, others = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)]
    optimizer, other = info.optim_cls(params), info.optim_cls(others)
    steps(optimizer, params, 4)
    torch.set_default_dtype(torch.float64)
    try:
        steps(other, others, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(flat(params), flat(others))


# ---------------------------------------------------------------------------------------------- learning rates


@every_optimizer
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_a_rate_in_a_tensor(info: Any, dims: int) -> None:
    """It is the rate, and what a scheduler writes into it holds; the tensor itself stays the caller's."""
    for given in few_inputs_of(info):
        rate = torch.full((1,) * dims, 0.015625)
        params, plain = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)]
        optimizer = info.optim_cls(params, **{**given.kwargs, "lr": rate})
        other = info.optim_cls(plain, **{**given.kwargs, "lr": 0.015625})
        schedules = [lr_scheduler.StepLR(optimizer, 2, 0.5), lr_scheduler.StepLR(other, 2, 0.5)]
        for seed in range(5):
            step(optimizer, params, seed)
            step(other, plain, seed)
            for schedule in schedules:
                schedule.step()
        assert torch.equal(flat(params), flat(plain))
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == 0.015625 / 4
        assert optimizer.param_groups[0]["initial_lr"].item() == 0.015625


def one_cycle(optimizer: Any) -> Any:
    cycles = any(word in optimizer.defaults for word in ("betas", "momentum"))
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12, cycle_momentum=cycles)


def cyclic(optimizer: Any) -> Any:
    cycles = any(word in optimizer.defaults for word in ("betas", "momentum"))
    return lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.05, step_size_up=3, cycle_momentum=cycles)


def sequential(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one_cycle": one_cycle,
    "cyclic": cyclic,
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "sequential": sequential,
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
}


@every_optimizer
@pytest.mark.filterwarnings("ignore:.* has changed during training. The average is")
@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_schedulers(info: Any, kind: str) -> None:
    """What a scheduler of torch writes into the groups, rates and betas or momentum, is what the steps are made with.

    The twin gets the same numbers by hand. Through a checkpoint half-way, as a Trainer makes one.
    """
    params, by_hand = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)]
    optimizer, manual = info.optim_cls(params), info.optim_cls(by_hand)
    schedule = SCHEDULERS[kind](optimizer)
    written = set()
    for seed in range(10):
        group = optimizer.param_groups[0]
        for key in ("lr", "betas", "momentum"):
            if key in group:
                if group[key] != manual.param_groups[0][key]:
                    written.add(key)
                manual.param_groups[0][key] = group[key]
        step(optimizer, params, seed)
        step(manual, by_hand, seed)
        schedule.step(*([1.0] if kind == "plateau" else []))
        if seed == 4:
            saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
            optimizer = info.optim_cls(params)
            schedule = SCHEDULERS[kind](optimizer)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
    assert torch.equal(flat(params), flat(by_hand))
    cycled = [key for key in ("betas", "momentum") if key in optimizer.defaults and kind in ("one_cycle", "cyclic")][:1]
    assert written == {"lr", *cycled}


# ---------------------------------------------------------------------------------------------- state_dict


def pairs(named: bool, rate: float = 0.02) -> tuple[list[Any], list[Any], list[Tensor], list[Tensor]]:
    """Twice the same two groups, with or without names, and their tensors."""
    out: list[Any] = []
    for _ in range(2):
        tensors = [leaf(2, 3), leaf(5, seed=1), leaf(2, 2, 2, seed=2)]
        given = list(zip(("a", "b", "c"), tensors, strict=True)) if named else tensors
        out += [[{"params": given[:2]}, {"params": given[2:], "lr": rate}], tensors]
    return out[0], out[2], out[1], out[3]


@every_optimizer
@pytest.mark.parametrize("named", [False, True])
def test_state_dict_is_deterministic(info: Any, named: bool) -> None:
    """Loading gives the same state_dict again, changes neither the dict nor later steps, and shares no memory."""
    for given in few_inputs_of(info):
        groups, others, params, twins = pairs(named, rate_beside(info, given, 0.02))
        optimizer, twin = info.optim_cls(groups, **given.kwargs), info.optim_cls(others, **given.kwargs)
        steps(optimizer, params, 5)
        saved = copy.deepcopy(optimizer.state_dict())
        untouched = copy.deepcopy(saved)
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
        twin.load_state_dict(saved)
        assert same_state(twin.state_dict(), untouched)
        steps(optimizer, params, 4, skip=5)
        steps(twin, twins, 4, skip=5)
        assert torch.equal(flat(params), flat(twins))
        assert same_state(saved, untouched)
        assert same_state(optimizer.state_dict(), twin.state_dict())
        if named:
            assert [group["param_names"] for group in twin.param_groups] == [["a", "b"], ["c"]]


@every_optimizer
def test_save_and_load_without_pickle(info: Any) -> None:
    for given in few_inputs_of(info):
        groups, others, params, twins = pairs(True, rate_beside(info, given, 0.02))
        optimizer, twin = info.optim_cls(groups, **given.kwargs), info.optim_cls(others, **given.kwargs)
        steps(optimizer, params, 5)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
        assert same_state(optimizer.state_dict(), twin.state_dict())
        assert len(twins) == len(params)


@every_optimizer
@pytest.mark.parametrize("named", [False, True])
def test_checkpoints_with_and_without_names_load_into_each_other(info: Any, named: bool) -> None:
    """Names that the optimizer has stay; names that only the checkpoint has come along."""
    rate = rate_beside(info, inputs_of(info)[0], 0.02)
    groups, _, params, _ = pairs(named, rate)
    _, others, _, twins = pairs(not named, rate)
    optimizer, twin = info.optim_cls(groups), info.optim_cls(others)
    steps(optimizer, params, 3)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    twin.load_state_dict(optimizer.state_dict())
    assert [group.get("param_names") for group in twin.param_groups] == [["a", "b"], ["c"]]
    steps(optimizer, params, 3, skip=3)
    steps(twin, twins, 3, skip=3)
    assert torch.equal(flat(params), flat(twins))


@every_optimizer
def test_an_older_checkpoint_without_an_option_loads(info: Any) -> None:
    """What the checkpoint does not say stays as it was built."""
    for option in info.optim_cls.options.values():
        params, twins = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)]
        optimizer = info.optim_cls(params)
        steps(optimizer, params, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].pop(option.name, None)
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
        twin = info.optim_cls(twins)
        twin.load_state_dict(saved)
        steps(optimizer, params, 3, skip=3)
        steps(twin, twins, 3, skip=3)
        assert torch.equal(flat(params), flat(twins))


@every_optimizer
def test_a_step_saved_as_a_number_loads(info: Any) -> None:
    params, twins = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)]
    optimizer, twin = info.optim_cls(params), info.optim_cls(twins)
    steps(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    twin.load_state_dict(saved)
    assert same_state(twin.state_dict(), optimizer.state_dict())


@every_optimizer
def test_state_dict_holds_tensors_and_plain_numbers_only(info: Any) -> None:
    """So that any program can read it: no class of ours, no function, nothing that needs pickle."""
    plain = (int, float, bool, str, type(None))

    def leaves(value: Any) -> Iterator[Any]:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
        if items is None:
            yield value
        else:
            for item in items:
                yield from leaves(item)

    for given in inputs_of(info):
        params = [leaf(2, 3), leaf(5, seed=1)]
        optimizer = info.optim_cls(params, **given.kwargs)
        steps(optimizer, params, 2)
        assert all(type(value) in (Tensor, *plain) for value in leaves(optimizer.state_dict()))


# ---------------------------------------------------------------------------------------------- copies


@every_optimizer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_have_every_public_attribute_and_go_on_alike(info: Any, duplicate: Callable[[Any], Any]) -> None:
    def public(optimizer: Any) -> set[str]:
        return {key for key in vars(optimizer) if not key.startswith("_")}

    for given in few_inputs_of(info):
        params = [leaf(2, 3), leaf(5, seed=1)]
        optimizer = info.optim_cls(params, **given.kwargs)
        steps(optimizer, params, 3)
        twins, twin = duplicate((params, optimizer))
        assert public(optimizer) == public(twin)
        assert type(twin) is type(optimizer)
        assert repr(twin) == repr(optimizer)
        steps(optimizer, params, 3, skip=3)
        assert not torch.equal(flat(params), flat(twins))
        steps(twin, twins, 3, skip=3)
        assert torch.equal(flat(params), flat(twins))


# ---------------------------------------------------------------------------------------------- hooks


@every_optimizer
def test_step_hooks_run_before_and_after_each_step(info: Any) -> None:
    """Those of the optimizer and those of all optimizers, in torch's order; a removed one runs no more."""
    params, seen = [leaf(2, 3)], []
    optimizer = info.optim_cls(params)

    def note(word: str) -> Callable[..., None]:
        return lambda given, args, kwargs: seen.append(f"{word} {given is optimizer} {len(args)}")

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    step(optimizer, params, 0)
    for handle in handles:
        handle.remove()
    step(optimizer, params, 1)
    assert seen == ["global pre True 2", "pre True 2", "post True 2", "global post True 2"]


@every_optimizer
def test_a_pre_hook_may_change_the_gradients(info: Any) -> None:
    params, twins = [leaf(2, 3)], [leaf(2, 3)]
    optimizer, twin = info.optim_cls(params), info.optim_cls(twins)

    def zero(given: Any, args: Any, kwargs: Any) -> None:
        params[0].grad = torch.zeros(2, 3)

    optimizer.register_step_pre_hook(zero)
    for _ in range(2):
        optimizer.step(*([lambda: 1.0] if info.step_requires_closure else []))
        step(twin, twins, 0, zero=True)
    assert torch.equal(flat(params), flat(twins))


@every_optimizer
def test_state_dict_hooks(info: Any) -> None:
    params, seen = [leaf(2, 3)], []
    optimizer = info.optim_cls(params)
    step(optimizer, params, 0)
    optimizer.register_state_dict_pre_hook(lambda given: seen.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda given: seen.append("first"), prepend=True)

    def only_groups(given: Any, saved: Any) -> dict[str, Any]:
        seen.append("post")
        return {**saved, "state": {}, "extra": 1}

    handle = optimizer.register_state_dict_post_hook(only_groups)
    saved = optimizer.state_dict()
    assert seen == ["first", "pre", "post"]
    assert saved["extra"] == 1
    assert not saved["state"]
    handle.remove()
    assert optimizer.state_dict()["state"]


@pytest.mark.parametrize("info", [INFOS["adam"], INFOS["lion"]], ids=lambda info: info.name)
def test_state_dict_hooks_see_tensors_where_state_is_kept_in_codes(info: Any) -> None:
    params: list[Tensor] = [leaf(64, 128)]
    optimizer = info.optim_cls(params, state_bits=8)
    step(optimizer, params, 0)
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda given, saved: seen.extend(saved["state"][0].values()))
    saved = optimizer.state_dict()
    assert [type(value) for value in seen] == [Tensor] * len(seen)
    assert all(map(torch.equal, seen, saved["state"][0].values()))
    assert {type(value) for value in optimizer.state[params[0]].values()} != {Tensor}


@every_optimizer
def test_load_state_dict_hooks(info: Any) -> None:
    """A hook before may replace what is loaded; a hook after sees, and may change, what was loaded."""
    params = [leaf(2, 3)]
    optimizer, twin = info.optim_cls(params), info.optim_cls([leaf(2, 3)])
    steps(optimizer, params, 3)
    seen: list[Any] = []

    def later(given: Any, saved: Any) -> dict[str, Any]:
        state = {index: {**slots, "step": torch.tensor(40.0)} for index, slots in saved["state"].items()}
        groups = [{**group, "lr": 0.25} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    twin.register_load_state_dict_pre_hook(later)
    twin.register_load_state_dict_pre_hook(lambda given, saved: seen.append("first"), prepend=True)

    def look(given: Any) -> None:
        state = next(iter(given.state.values()))
        seen.append((given.param_groups[0]["lr"], float(state["step"])))
        state["step"].fill_(41.0)

    twin.register_load_state_dict_post_hook(look)
    before = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(optimizer.state_dict())
    assert seen == ["first", (0.25, 40.0)]
    assert float(next(iter(twin.state.values()))["step"]) == 41.0
    assert same_state(optimizer.state_dict(), before)
    twin.load_state_dict(optimizer.state_dict())
    assert len(seen) == 4  # our own hooks do not stay behind


@every_optimizer
def test_a_failed_load_leaves_no_hook_behind(info: Any) -> None:
    params = [leaf(2, 3)]
    optimizer = info.optim_cls(params)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(info.optim_cls([*params, leaf(2)]).state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


# ---------------------------------------------------------------------------------------------- company


@every_optimizer
def test_a_gradient_scaler_skips_steps_that_overflow(info: Any) -> None:
    """Without a trace in parameters, state or counters; and scaling by a power of two changes no other step."""
    for given in few_inputs_of(info):
        params, plain = [leaf(2, 3), leaf(5, seed=1)], [leaf(2, 3), leaf(5, seed=1)]
        optimizer, other = info.optim_cls(params, **given.kwargs), info.optim_cls(plain, **given.kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for seed in range(5):
            overflows = seed == 2
            for own, stepper in ((params, optimizer), (plain, other)):
                generator = torch.Generator().manual_seed(seed)
                factor = scaler.get_scale() if stepper is optimizer else 1.0
                for p in own:
                    p.grad = factor * torch.randn(p.shape, generator=generator)
                if overflows and stepper is optimizer:
                    own[0].grad[0, 0] = float("inf")  # type: ignore[index]
                if stepper.inputs:
                    stepper.set_loss(1.0)
            before, state = flat(params), copy.deepcopy(optimizer.state_dict())
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
            if overflows:
                assert torch.equal(flat(params), before)
                assert same_state(optimizer.state_dict(), state)
            else:
                other.step()
                assert torch.equal(flat(params), flat(plain))
        assert scaler.get_scale() == 2.0**9


@every_optimizer
def test_an_averaged_model_changes_nothing(info: Any) -> None:
    """And averages the iterates as they are after each step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    params, others = list(model.parameters()), list(twin.parameters())
    optimizer, other = info.optim_cls(params), info.optim_cls(others)
    average, iterates = AveragedModel(model), []
    for seed in range(4):
        step(optimizer, params, seed)
        average.update_parameters(model)
        step(other, others, seed)
        iterates.append(flat(others))
    assert torch.equal(flat(params), flat(others))
    torch.testing.assert_close(flat(list(average.parameters())), torch.stack(iterates).mean(0))


@every_optimizer
def test_two_optimizers_on_the_same_gradients(info: Any) -> None:
    """The second sees the gradients that the first saw: nobody writes into them."""
    for given in inputs_of(info):
        params = [leaf(2, 3), leaf(5, seed=1)]
        optimizer = info.optim_cls(params, **{**given.kwargs, "weight_decay": 0.1})
        step(optimizer, params, 0)
        before = [p.grad.clone() for p in params if p.grad is not None]
        if optimizer.inputs:
            optimizer.set_loss(1.0)
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True) if p.grad is not None)


@every_optimizer
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_an_optimizer_dies_with_its_last_reference(info: Any, engine: str) -> None:
    """And lets go of parameters and state: nothing that outlives a step holds them."""
    params = [leaf(2, 3), leaf(5, seed=1)]
    optimizer = info.optim_cls(params, engine=engine)
    steps(optimizer, params, 2)
    alive = [weakref.ref(optimizer), weakref.ref(params[0])]
    del optimizer, params
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


@every_optimizer
def test_nothing_warns(info: Any) -> None:
    """Building, stepping, printing, saving and loading."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* got parameters without their module")  # of Muon, which asks for roles
        params = make_params(dtype=torch.float32)
        optimizer: Optimizer = info.optim_cls(params)
        steps(optimizer, params, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        assert repr(optimizer)
