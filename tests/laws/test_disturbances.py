"""What other code replaces, moves, turns or writes between two steps counts in the next one, however a step looks.

An engine that walks over memory keeps tables of addresses. Its twin is the reference, which sorts all parameters anew
in each step, so that it remembers nothing that could be out of date.
"""

from __future__ import annotations

import collections
import contextlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.engines import native
from tests.harness.engines import serves
from tests.harness.problems import NAMES, build, gradients, loss_of, make_params

SHAPES = ((6, 6), (5,), (4, 3))
Disturbance = Callable[[Optimizer, Tensor], None]


def slots(optimizer: Optimizer, p: Tensor) -> list[str]:
    """The slots with a number for each element."""
    found = {name for name, slot in optimizer.slots.items() if slot.per == "element" and slot.without is None}
    return [name for name in optimizer.state[p] if name in found]


def replace_slots(optimizer: Optimizer, p: Tensor) -> None:
    for name in slots(optimizer, p):
        optimizer.state[p][name] = optimizer.state[p][name] * 1.5


def move_slots(optimizer: Optimizer, p: Tensor) -> None:
    for name in slots(optimizer, p):
        value = optimizer.state[p][name]
        value.data = value.detach() * 1.5


def set_slots(optimizer: Optimizer, p: Tensor) -> None:
    for name in slots(optimizer, p):
        optimizer.state[p][name].set_((optimizer.state[p][name] * 1.5).untyped_storage(), 0, p.shape)


def turn_slots(optimizer: Optimizer, p: Tensor) -> None:
    for name in slots(optimizer, p):
        optimizer.state[p][name].t_()


def replace_the_state(optimizer: Optimizer, p: Tensor) -> None:
    state = dict(optimizer.state[p])
    optimizer.state[p] = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def order_the_state_anew(optimizer: Optimizer, p: Tensor) -> None:
    optimizer.state[p] = optimizer.state.pop(p)


def replace_the_counter(optimizer: Optimizer, p: Tensor) -> None:
    optimizer.state[p]["step"] = torch.tensor(7.0)


def write_the_counter(optimizer: Optimizer, p: Tensor) -> None:
    optimizer.state[p]["step"].add_(2)


def move_the_parameter(optimizer: Optimizer, p: Tensor) -> None:
    p.data = p.detach() * 1.5


def turn_the_parameter(optimizer: Optimizer, p: Tensor) -> None:
    p.data = p.detach().t()


def turn_the_gradient(optimizer: Optimizer, p: Tensor) -> None:
    assert p.grad is not None
    p.grad = p.grad.t()


def move_the_gradient(optimizer: Optimizer, p: Tensor) -> None:
    assert p.grad is not None
    p.grad = p.grad * 1.5


def write_the_gradient(optimizer: Optimizer, p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(1.5)


def negate_the_gradient_lazily(optimizer: Optimizer, p: Tensor) -> None:
    assert p.grad is not None
    p.grad = torch._neg_view(p.grad)


def drop_the_gradient(optimizer: Optimizer, p: Tensor) -> None:
    p.grad = None


def nothing(optimizer: Optimizer, p: Tensor) -> None:
    """The step looks as in most steps."""


DISTURBANCES: tuple[Disturbance, ...] = (
    *(nothing, replace_slots, move_slots, set_slots, turn_slots, replace_the_state, order_the_state_anew),
    *(replace_the_counter, write_the_counter, move_the_parameter, turn_the_parameter, turn_the_gradient),
    *(move_the_gradient, write_the_gradient, negate_the_gradient_lazily, drop_the_gradient, nothing),
)


class Run:
    """An optimizer, and all of its parameters after each step."""

    def __init__(self, name: str, engine: str, afresh: bool) -> None:
        self.params = make_params(SHAPES, torch.float32)
        self.optimizer = build(name, self.params, engine=engine)
        self.afresh = afresh

    def step(self, disturb: Disturbance, grads: list[Tensor | None], step: int) -> None:
        """Take a step that is disturbed after its gradients have been set."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        if self.optimizer.inputs:
            self.optimizer.set_loss(*loss_of(step))
        disturb(self.optimizer, self.params[0])
        if self.afresh:
            self.optimizer._runner.clear_cache()
        self.optimizer.step()


@pytest.mark.engines
@pytest.mark.parametrize("name", NAMES)
def test_what_has_changed_between_two_steps_counts(name: str, way_of_looking: str) -> None:
    if not serves("compiled", name):
        pytest.skip("no C++ compiler, or an update that needs the reference")
    kept, afresh = Run(name, "compiled", False), Run(name, "reference", True)
    todo = [disturb for found in DISTURBANCES for disturb in (nothing, nothing, found)]
    for step, (disturb, grads) in enumerate(zip(todo, gradients(len(todo), SHAPES, torch.float32), strict=True)):
        for run in (kept, afresh):
            run.step(disturb, [*grads], step)
        for p, q in zip(kept.params, afresh.params, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-5, msg=lambda text: f"{disturb.__name__}: {text}")  # noqa: B023
            with torch.no_grad():  # what one step differs by may grow in the next ones, and is not asked for here
                q.copy_(p)
                for key, value in kept.optimizer.state[p].items():
                    if isinstance(value, Tensor):
                        afresh.optimizer.state[q][key].copy_(value)


class WithItsOwnGradient(torch.nn.Parameter):
    """A parameter that keeps its gradient elsewhere."""

    grad: Any = property(lambda self: getattr(self, "own", None), lambda self, value: setattr(self, "own", value))


def test_a_parameter_may_have_its_own_way_to_its_gradient(way_of_looking: str) -> None:
    p = WithItsOwnGradient(torch.ones(3))
    optimizer = build("sgd", [p], lr=0.1, momentum=0.0)
    for step in range(5):
        torchs: Any = Tensor.grad
        torchs.__set__(p, torch.full((3,), 100.0))
        p.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 * (step + 1)))


@pytest.mark.parametrize("mapping", [types.MappingProxyType, collections.UserDict])
def test_the_state_may_be_any_mapping(mapping: Callable[..., Any], way_of_looking: str) -> None:
    run, twin = Run("adamw", "auto", False), Run("adamw", "auto", False)
    for step, grads in enumerate(gradients(6, SHAPES, torch.float32)):
        for one in (run, twin):
            one.step(nothing, [*grads], step)
        if step == 2:
            run.optimizer.state = mapping(dict(run.optimizer.state))
    assert all(map(torch.equal, run.params, twin.params))


def test_what_another_program_keeps_in_the_state_may_change(way_of_looking: str) -> None:
    """It costs one closer look, and no more in the steps after it."""
    run = Run("adamw", "auto", False)
    p = run.params[0]
    looks = []
    for step, grads in enumerate(gradients(9, SHAPES, torch.float32)):
        if step in (2, 5):
            run.optimizer.state[p]["note"] = step
        run.step(nothing, [*grads], step)
        library, watch = native.native(), run.optimizer._runner.cached["update"].watch
        if library is not None:
            looks.append(library.holds(run.optimizer.state, watch.keys, watch.states, watch.everything))
    assert all(looks)


def test_a_fake_mode_leaves_no_trace(way_of_looking: str) -> None:
    """A mode of torch may make every new tensor one without memory."""
    run = Run("adamw", "auto", False)
    for step, grads in enumerate(gradients(4, SHAPES, torch.float32)):
        run.step(nothing, [*grads], step)
    before = [p.detach().clone() for p in run.params]
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(Exception):
        run.optimizer.step()
    assert all(map(torch.equal, before, run.params))
