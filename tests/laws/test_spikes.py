"""A finite gradient that is too large to be squared counts as zero, for every optimizer, option, engine and storage.

A step with such an element is bit for bit the step in which that element is zero. So weights stay finite, no other
weight notices, and the weight itself moves again in the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.engines.cpp.compiler import without_compiler
from lightning_optim.stages import Average, Lookahead, Noise, Stage
from tests.harness import problems
from tests.harness.engines import differences, quantizes, serving
from tests.harness.problems import NAMES, apply, make_params
from tests.optimizers.settings import SETS

LARGEST = 2.0**50
SHAPES = ((), (7,), (6, 5))
LARGE = (70, 61)  # it has codes
every_engine = pytest.mark.parametrize(("name", "engine"), serving(NAMES))
pytestmark = pytest.mark.usefixtures("quiet_interpreter")
ENGINES = ("reference", "blocked", *(() if without_compiler() else ("compiled",)))
Change = Callable[[int, Tensor], None]


def spikes(step: int, grad: Tensor) -> None:
    """Elements of several magnitudes and signs: in the first step, in two that follow each other, and all at once."""
    if step in (0, 2, 3):
        grad.view(-1)[::3] = 1e20 if step % 2 else -3e38
    if step == 4:
        grad.fill_(-2e15)


def zeros(step: int, grad: Tensor) -> None:
    """Zeros where `spikes` has spikes."""
    if step in (0, 2, 3):
        grad.view(-1)[::3] = 0.0
    if step == 4:
        grad.zero_()


def drive(optimizer: Optimizer, params: list[Tensor], change: Change, steps: int = 7) -> None:
    """Steps with fixed gradients, after a change. Complex ones change in both parts."""
    for step, grads in enumerate(problems.gradients(steps, [tuple(p.shape) for p in params], params[0].dtype)):
        for grad in grads:
            change(step, torch.view_as_real(grad) if grad.is_complex() else grad)
        apply(optimizer, params, grads, step)


def ends(
    name: str,
    engine: str,
    *changes: Change,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    dtype: torch.dtype = torch.float32,
    stages: Callable[[Optimizer], list[Stage]] = lambda optimizer: [],
    **options: Any,
) -> list[Any]:
    """Optimizer and parameters after each of some runs."""
    found: list[Any] = []
    for change in changes:
        params = make_params(shapes, dtype)
        optimizer = problems.build(name, params, engine=engine, **options)
        for stage in stages(optimizer):
            optimizer.append(stage)
        drive(optimizer, params, change)
        found += [optimizer, params]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_under_every_option(name: str) -> None:
    for options in ({}, *SETS[name]):
        one, params, other, others = ends(name, "reference", spikes, zeros, **options)
        assert differences(one, params, other, others) == [], options
        assert all(bool(p.isfinite().all()) for p in params), options


@every_engine
@pytest.mark.parametrize("state_bits", [16, 8])
def test_in_few_bits_beside_stages(name: str, engine: str, state_bits: int) -> None:
    if state_bits == 8 and not quantizes(name):
        pytest.skip("it has no state to keep in 8 bits, and says so")

    def stages(optimizer: Optimizer) -> list[Stage]:
        noise = Noise(global_indices([], optimizer), kind="moments")
        return [noise, Lookahead(k=2), Average()]

    options: dict[str, Any] = {"shapes": (*SHAPES, LARGE), "stages": stages, "state_bits": state_bits}
    one, params, other, others = ends(name, engine, spikes, zeros, **options)
    assert differences(one, params, other, others) == []
    assert all(bool(p.isfinite().all()) for p in params)


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float64])
def test_in_every_dtype(name: str, engine: str, dtype: torch.dtype) -> None:
    """In float64 all of these have finite squares, and 1e160 is the first that has none."""
    if engine == "triton" and dtype == torch.float64:
        pytest.skip("it computes in float32")
    if dtype == torch.complex64 and OPTIMIZERS[name].real_only:
        pytest.skip(OPTIMIZERS[name].real_only)

    def scaled(step: int, grad: Tensor) -> None:
        spikes(step, grad)
        if dtype == torch.float64:
            grad.mul_(torch.where(grad.abs() > LARGEST, torch.tensor(1e160, dtype=dtype), 1.0))

    one, params, other, others = ends(name, engine, scaled, zeros, dtype=dtype)
    assert differences(one, params, other, others) == []
    assert all(bool(p.isfinite().all()) for p in params)


def all_of_it(step: int, grad: Tensor) -> None:
    """The largest that counts, in all elements of steps that follow each other."""
    if step in (1, 2, 3):
        grad.fill_(LARGEST if step % 2 else -LARGEST)


def beside_zeros(step: int, grad: Tensor) -> None:
    """The largest that counts, in one element of the first step."""
    if step == 0:
        grad.zero_()
        grad.view(-1)[0] = LARGEST


@every_engine
def test_the_largest_that_counts_leaves_weights_finite_in_8_bits(name: str, engine: str) -> None:
    if not quantizes(name):
        pytest.skip("it has no state to keep in 8 bits, and says so")
    for state_format in ("log", "dynamic"):
        for change in (all_of_it, beside_zeros):
            given: dict[str, Any] = {"shapes": (LARGE,), "state_bits": 8, "state_format": state_format}
            _, params = ends(name, engine, change, **given)
            assert all(bool(p.isfinite().all()) for p in params), state_format


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_that_counts_leaves_weights_and_state_finite(name: str) -> None:
    for options in ({}, *SETS[name]):
        for change in (all_of_it, beside_zeros):
            optimizer, params = ends(name, "reference", change, **options)
            state = [value for slots in optimizer.state.values() for value in slots.values()]
            assert all(bool(x.isfinite().all()) for x in (*params, *state, *optimizer.shared_slots().values())), options


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_counts_up_to_the_bound_and_infinity_stays(engine: str, dtype: torch.dtype) -> None:
    """Shown by SGD without momentum: p becomes p - g."""
    largest = 2.0**500 if dtype == torch.float64 else LARGEST
    beyond = torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)).item()
    grad = [1.0, largest, -largest, beyond, -beyond, torch.finfo(dtype).max, torch.inf, -torch.inf, torch.nan]
    p = torch.nn.Parameter(torch.zeros(len(grad), dtype=dtype))
    optimizer = problems.build("sgdw", [p], lr=1.0, momentum=0.0, engine=engine)
    apply(optimizer, [p], [torch.tensor(grad, dtype=dtype)])
    expected = [-1.0, -largest, largest, 0.0, 0.0, 0.0, -torch.inf, torch.inf, torch.nan]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


def test_noise_on_an_optimizer_of_torch_forgets_it_too() -> None:
    """Its slots stay finite; the gradient itself is the affair of that optimizer."""
    from lightning_optim.core.foreign_stages import attach

    p = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([p], lr=1e-3)
    attach(Noise(global_indices([], optimizer), kind="moments"), optimizer)
    for step in range(3):
        p.grad = torch.full((5,), 1e20 if step == 1 else 1.0)
        optimizer.step()
    assert p.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[p].values())


@pytest.mark.parametrize("name", ["koala_v", "koala_m"])
@pytest.mark.parametrize("loss", [1e15, 1e30, 3e38])
def test_a_loss_may_be_as_large(name: str, loss: float) -> None:
    for engine in ENGINES:
        for options in ({}, *SETS[name]):
            params = make_params(SHAPES, torch.float32)
            optimizer = problems.build(name, params, engine=engine, **options)
            for step, grads in enumerate(problems.gradients(4, SHAPES, torch.float32)):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                optimizer.set_loss(loss if step == 1 else 1.0)
                optimizer.step()
            assert all(bool(p.isfinite().all()) for p in params), (engine, options)
