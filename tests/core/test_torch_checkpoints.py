"""Checkpoints of `torch.optim` load here and go on as torch would, and ours load into torch."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim.optimizers  # noqa: F401  (registers the pages)
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from tests.harness.problems import flat, gradients, make_params

SHAPES = ((), (5,), (3, 4), (4, 2, 3, 3))
BEFORE, AFTER = 7, 10  # RAdam rectifies from step 6 on: both of its branches lie before the checkpoint

# float64: both programs make the same formula of other elementary operations; what differs are last digits.
# float32: each of up to 17 steps rounds the parameter once, by at most 6e-8 of it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 17 * 6e-8}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def make(name: str, params: Any, **options: Any) -> Optimizer:
    """Our optimizer of that name, at its default options unless some are given."""
    return OPTIMIZERS[name](params, **options)


@dataclass(frozen=True)
class Case:
    """An optimizer that torch has too, and options that both understand."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def ours(self, params: Any, **options: Any) -> Optimizer:
        return make(self.name, params, **{**self.options, **options})

    def theirs(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = TORCH[self.name](params, **{**self.options, **options})
        return optimizer


TORCH: dict[str, Any] = {
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CASES = [
    Case("adam"),
    Case("adam", ADAM),
    Case("adam", {"betas": (0.9, 0.9), "amsgrad": True}),
    Case("adam", {**ADAM, "amsgrad": True, "maximize": True}),
    Case("adam", {**ADAM, "decoupled_weight_decay": True}),
    Case("adamw"),
    Case("adamw", {**ADAM, "maximize": True}),
    Case("adamw", {"betas": (0.9, 0.9), "amsgrad": True, "weight_decay": 0.1}),
    Case("radam"),
    Case("radam", ADAM),
    Case("radam", {**ADAM, "decoupled_weight_decay": True, "maximize": True}),
    Case("rmsprop"),
    Case("rmsprop", {"lr": 1e-3, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    Case("rmsprop", {"lr": 1e-3, "centered": True, "eps": 1e-3}),
    Case("rmsprop", {"lr": 1e-3, "momentum": 0.9}),
    Case("rmsprop", {"lr": 1e-3, "momentum": 0.5, "centered": True, "eps": 1e-3, "weight_decay": 0.1}),
    Case("adamax"),
    Case("adamax", {**ADAM, "eps": 0.1, "maximize": True}),
    Case("adafactor"),
    Case("adafactor", {"lr": 0.1, "beta2_decay": -0.6, "eps": (0.1, 1e-2), "d": 1.5, "weight_decay": 0.1}),
    Case("adafactor", {"weight_decay": 0.1, "maximize": True}),
    Case("nadam"),
    Case("nadam", ADAM),
    Case("nadam", {**ADAM, "momentum_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    Case("adagrad"),
    Case("adagrad", {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3}),
    Case("adagrad", {"weight_decay": 0.1, "maximize": True}),
    Case("sgd"),
    Case("sgd", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    Case("sgd", {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]
COUNTED = sorted(set(TORCH) - {"sgd"})  # torch's SGD counts no steps
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def products_as_exact_as_ours(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch multiplies NAdam's momenta in the default dtype, and we always in float64."""
    before = torch.get_default_dtype()
    if "nadam" in request.node.name:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, skip: int = 0) -> Iterator[Tensor]:
    """Steps `skip` to `skip + steps` of one fixed run, as iterates."""
    shapes = [tuple(p.shape) for p in params]
    for grads in itertools.islice(gradients(skip + steps, shapes, params[0].dtype), skip, None):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        yield flat(params)


def drive(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, skip: int = 0) -> Tensor:
    """All iterates of these steps in one tensor."""
    return torch.stack(list(run(optimizer, params, steps, skip)))


def through_a_file(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Any]:
    """Parameters and the state_dict of an optimizer, written and read again without pickle."""
    file = io.BytesIO()
    torch.save({"params": list(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    return [torch.nn.Parameter(p.detach()) for p in saved["params"]], saved["optimizer"]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- the same run


@every_case
@every_dtype
def test_the_whole_run_agrees(case: Case, dtype: torch.dtype) -> None:
    params, theirs = make_params(SHAPES, dtype), make_params(SHAPES, dtype)
    steps = BEFORE + AFTER
    assert_close(drive(case.ours(params), params, steps), drive(case.theirs(theirs), theirs, steps))


@every_case
def test_agrees_under_a_schedule_with_groups_and_missing_gradients(case: Case) -> None:
    """Counters are each tensor's own, and what a scheduler writes into a group holds for that group."""
    params, theirs = make_params(SHAPES), make_params(SHAPES)
    both = [
        (params, case.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}])),
        (theirs, case.theirs([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.02}])),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12) for _, optimizer in both]
    for step, grads in enumerate(gradients(12, SHAPES)):
        for own, optimizer in both:
            for i, (p, grad) in enumerate(zip(own, grads, strict=True)):
                p.grad = None if (step + i) % 3 == 0 else grad.clone()
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_close(flat(params), flat(theirs))


def test_every_shared_option_leaves_its_default() -> None:
    """In some case above, and so is held against torch."""
    missing = []
    for name in TORCH:
        theirs = TORCH[name]([torch.nn.Parameter(torch.zeros(1))]).defaults
        for option in OPTIMIZERS[name].options.values():
            values = [case.options.get(option.name, option.default) for case in CASES if case.name == name]
            if option.name in theirs and set(map(str, values)) == {str(option.default)}:
                missing.append(f"{name}.{option.name}")
    known = ("decoupled_weight_decay", "capturable")  # torch sets the one itself; the other has tests of its own
    assert not [word for word in missing if not word.endswith(known)]


def test_defaults_are_those_of_torch() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    for name, cls in TORCH.items():
        theirs = cls([p]).defaults
        shared = {key: option.default for key, option in OPTIMIZERS[name].options.items() if key in theirs}
        assert shared == {key: theirs[key] for key in shared}


# ---------------------------------------------------------------------------------------------- torch -> ours


@every_case
@every_dtype
def test_a_checkpoint_of_torch_continues(case: Case, dtype: torch.dtype) -> None:
    """Ours is built with other options: those of the checkpoint hold."""
    theirs = make_params(SHAPES, dtype)
    torchs = case.theirs(theirs)
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    optimizer = make(case.name, params, lr=0.5, weight_decay=0.7)
    optimizer.load_state_dict(saved)
    assert_close(drive(optimizer, params, AFTER, BEFORE), drive(torchs, theirs, AFTER, BEFORE))
    if case.name in COUNTED:
        for p, q in zip(params, theirs, strict=True):
            assert optimizer.state[p].keys() == torchs.state[q].keys()
            assert int(optimizer.state[p]["step"]) == BEFORE + AFTER


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_how_torch_ran_its_steps_does_not_matter(name: str, flag: str) -> None:
    case = Case(name, ADAM)
    theirs = make_params(SHAPES)
    torchs = case.theirs(theirs, **{flag: True})
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    optimizer = case.ours(params)
    optimizer.load_state_dict(saved)
    assert not {"foreach", "fused", "capturable", "differentiable"} & optimizer.param_groups[0].keys()
    assert_close(drive(optimizer, params, AFTER, BEFORE), drive(torchs, theirs, AFTER, BEFORE))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_a_checkpoint_from_before_the_first_step_loads(name: str) -> None:
    theirs, params = make_params(SHAPES), make_params(SHAPES)
    torchs, optimizer = TORCH[name](theirs), make(name, params, lr=0.5)
    _, saved = through_a_file(theirs, torchs)
    assert name == "adagrad" or not saved["state"]  # torch makes its sums with the optimizer
    optimizer.load_state_dict(saved)
    assert_close(drive(optimizer, params, AFTER), drive(torchs, theirs, AFTER))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_a_tensor_without_state_starts_at_its_own_first_step(name: str) -> None:
    """A layer that was frozen until the checkpoint."""
    theirs = make_params(SHAPES)
    torchs = TORCH[name](theirs)
    for _ in run(torchs, theirs[:3], BEFORE):
        pass
    params, saved = through_a_file(theirs, torchs)
    optimizer = make(name, params)
    optimizer.load_state_dict(saved)
    assert_close(drive(optimizer, params, AFTER), drive(torchs, theirs, AFTER))
    if name in COUNTED:
        assert [int(optimizer.state[p]["step"]) for p in params] == [BEFORE + AFTER] * 3 + [AFTER]


@pytest.mark.parametrize("name", COUNTED)
def test_a_step_saved_as_a_number_loads(name: str) -> None:
    """As torch wrote it before 1.12."""
    theirs = make_params(SHAPES)
    torchs = TORCH[name](theirs)
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    optimizer = make(name, params)
    optimizer.load_state_dict(saved)
    assert_close(drive(optimizer, params, AFTER, BEFORE), drive(torchs, theirs, AFTER, BEFORE))


def test_several_groups_come_back_in_order() -> None:
    theirs = make_params(SHAPES)
    torchs = torch.optim.AdamW([{"params": theirs[2:], "lr": 0.1}, {"params": theirs[:2], "weight_decay": 0.3}])
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    optimizer = make("adamw", [{"params": params[2:]}, {"params": params[:2]}])
    optimizer.load_state_dict(saved)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.01), (1e-3, 0.3)]
    assert_close(drive(optimizer, params, AFTER, BEFORE), drive(torchs, theirs, AFTER, BEFORE))


def test_the_rate_that_a_scheduler_began_with_comes_along() -> None:
    theirs = make_params(SHAPES)
    torchs = torch.optim.Adam(theirs, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(torchs, 3)
    for _ in run(torchs, theirs, BEFORE):
        schedule.step()
    params, saved = through_a_file(theirs, torchs)
    optimizer = make("adam", params)
    ours = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    optimizer.load_state_dict(saved)
    ours.load_state_dict(schedule.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    for _ in zip(run(torchs, theirs, AFTER, BEFORE), run(optimizer, params, AFTER, BEFORE), strict=True):
        schedule.step()
        ours.step()
        assert optimizer.param_groups[0]["lr"] == torchs.param_groups[0]["lr"]
        assert_close(flat(params), flat(theirs))


# ---------------------------------------------------------------------------------------------- ours -> torch


@every_case
@every_dtype
def test_ours_continues_in_torch(case: Case, dtype: torch.dtype) -> None:
    """torch fills in the flags of its own (foreach and the like) and reads past keys that it does not know."""
    params = make_params(SHAPES, dtype)
    optimizer = case.ours(params)
    drive(optimizer, params, BEFORE)
    theirs, saved = through_a_file(params, optimizer)
    torchs = TORCH[case.name](theirs, lr=0.5, weight_decay=0.7)
    flags = {key: torchs.param_groups[0][key] for key in torchs.param_groups[0] if key not in optimizer.options}
    torchs.load_state_dict(saved)
    for key, value in flags.items():
        if key != "params":  # torch's SGD fills in False where its constructor has None
            assert (torchs.param_groups[0][key] or None) == (value or None)
    assert_close(drive(optimizer, params, AFTER, BEFORE), drive(torchs, theirs, AFTER, BEFORE))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_there_and_back_again(name: str) -> None:
    """ours -> torch -> ours: the state is the same bit for bit, the options too."""
    params = make_params(SHAPES)
    optimizer = make(name, params, lr=0.02)
    drive(optimizer, params, BEFORE)
    before = copy.deepcopy(optimizer.state_dict())
    theirs, saved = through_a_file(params, optimizer)
    torchs = TORCH[name](theirs)
    torchs.load_state_dict(saved)
    _, saved = through_a_file(theirs, torchs)
    other = make(name, make_params(SHAPES))
    other.load_state_dict(saved)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert state.keys() == after["state"][index].keys()
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


# ---------------------------------------------------------------------------------------------- mixed situations


def test_another_number_of_groups_is_refused() -> None:
    params = make_params(SHAPES)
    saved = torch.optim.Adam([{"params": params[:2]}, {"params": params[2:]}]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make("adam", params).load_state_dict(saved)


def test_a_group_of_another_size_is_refused() -> None:
    params = make_params(SHAPES)
    saved = torch.optim.Adam(params[:2]).state_dict()
    optimizer = make("adam", params)
    drive(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(before["state"][0][key], after["state"][0][key]) for key in before["state"][0])


def test_another_algorithm_starts_fresh_and_says_so() -> None:
    theirs = make_params(SHAPES)
    torchs = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    optimizer, fresh_params = make("adam", params), [torch.nn.Parameter(p.detach().clone()) for p in params]
    message = (
        r"Adam loads .*: nothing taken; exp_avg, exp_avg_sq, step starts fresh; momentum_buffer of the .* left out"
    )
    with pytest.warns(UserWarning, match=message):
        optimizer.load_state_dict(saved)
    fresh = make("adam", fresh_params)  # options of another class are not taken
    assert torch.equal(drive(optimizer, params, 3), drive(fresh, fresh_params, 3))


def test_a_slot_that_the_checkpoint_lacks_starts_fresh_and_says_so() -> None:
    """Adam without amsgrad into Adam that is told to have it."""
    theirs = make_params(SHAPES)
    torchs = torch.optim.Adam(theirs)
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    saved["param_groups"][0]["amsgrad"] = True
    optimizer = make("adam", params)
    with pytest.warns(UserWarning, match="max_exp_avg_sq starts fresh"):
        optimizer.load_state_dict(saved)
    assert all(not optimizer.state[p]["max_exp_avg_sq"].any() for p in params)
    assert torch.equal(optimizer.state[params[2]]["exp_avg"], torchs.state[theirs[2]]["exp_avg"])
    assert int(optimizer.state[params[2]]["step"]) == BEFORE


def test_a_slot_of_another_shape_is_refused() -> None:
    """A checkpoint of another model with the same number of tensors."""
    params = make_params(((3, 4),))
    saved = through_a_file(make_params(((2, 6),)), torch.optim.Adam(make_params(((2, 6),))))[1]
    saved["state"] = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 6), "exp_avg_sq": torch.zeros(2, 6)}}
    with pytest.raises(ValueError, match=r"exp_avg.*\(2, 6\).*\(3, 4\)"):
        make("adam", params).load_state_dict(saved)


def test_float32_state_of_half_precision_parameters_is_not_rounded() -> None:
    """torch itself would cast it to bfloat16 while loading."""
    params = make_params(SHAPES, torch.bfloat16)
    optimizer = make("adam", params)
    drive(optimizer, params, BEFORE)
    again, saved = through_a_file(params, optimizer)
    other = make("adam", again)
    other.load_state_dict(saved)
    for p, q in zip(params, again, strict=True):
        for key, value in optimizer.state[p].items():
            assert value.dtype == torch.float32 == other.state[q][key].dtype
            assert torch.equal(value, other.state[q][key])
    assert any(not torch.equal(s["exp_avg"], s["exp_avg"].bfloat16().float()) for s in other.state.values())
    assert torch.equal(drive(other, again, AFTER, BEFORE), drive(optimizer, params, AFTER, BEFORE))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_torch_state_keeps_its_digits_beside_half_precision_parameters(name: str) -> None:
    """A float32 checkpoint of torch, the parameters now bfloat16."""
    theirs = make_params(SHAPES, torch.float32)
    torchs = TORCH[name](theirs)
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    optimizer = make(name, params)
    optimizer.load_state_dict(saved)
    for p, q in zip(params, theirs, strict=True):
        for key, value in torchs.state[q].items():
            assert optimizer.state[p][key].dtype == (torch.float64 if key == "mu_product" else torch.float32)
            assert torch.equal(optimizer.state[p][key], value.to(optimizer.state[p][key].dtype))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_torch_state_in_half_precision_loads_into_float32(name: str) -> None:
    theirs = make_params(SHAPES, torch.bfloat16)
    torchs = TORCH[name](theirs)
    drive(torchs, theirs, BEFORE)
    params, saved = through_a_file(theirs, torchs)
    optimizer = make(name, params)
    optimizer.load_state_dict(saved)
    for p, q in zip(params, theirs, strict=True):
        for key, value in torchs.state[q].items():
            assert optimizer.state[p][key].dtype == (torch.float64 if key == "mu_product" else torch.float32)
            assert torch.equal(optimizer.state[p][key], value.to(optimizer.state[p][key].dtype))
