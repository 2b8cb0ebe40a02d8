"""A step that failed has not been counted: no counter moves without its weights, whatever failed, on every engine."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import engines, storage
from lightning_optim.core.foreign_stages import attach
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.engines import compiled, reference
from lightning_optim.engines.cpp import compiler
from lightning_optim.engines.plan import Plan
from lightning_optim.errors import EngineError, OptionError
from lightning_optim.stages import Average, Lookahead
from lightning_optim.storage import Quantized
from tests.harness.problems import NAMES, apply, build, flat, gradients, make_params, moving

SHAPES = ((3,), (4, 5), (70, 61))
ERRORS = (MemoryError, KeyboardInterrupt, RuntimeError)
SLOW = ("lamb",)  # what the interpreter of Triton runs here, on small tensors


def serves(engine: str, name: str) -> bool:
    params = make_params(((3, 4),), torch.float32)
    return not engines.ENGINES[engine].refusal(build(name, params).first_programs(), params)


CASES = [
    pytest.param(name, engine, marks=() if engine == "reference" else (pytest.mark.engines,))
    for engine in engines.ENGINES
    for name in (SLOW if engine == "triton" else NAMES)
    if serves(engine, name)
]
pytestmark = pytest.mark.usefixtures("quiet_interpreter")
every_optimizer = pytest.mark.parametrize(("name", "engine"), CASES)


def make(name: str, engine: str, bits: int = 32) -> tuple[Optimizer, list[Tensor]]:
    """An optimizer with stages, in the state of which everything counts that can."""
    params: list[Tensor] = make_params(SHAPES[:2] if engine == "triton" else SHAPES, torch.float32)
    quantizes = any(storage.can_be_quantized(slot) for slot in OPTIMIZERS[name].slots.values())
    optimizer = build(name, params, engine=engine, weight_decay=0.1, state_bits=bits if quantizes else 32)
    optimizer.append(Average("ema", 0.9, start=2))
    optimizer.append(Lookahead(3, 0.5))
    return optimizer, params


def all_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Any]:
    """Everything that a step changes: weights, state with its keys, options, and what stages count."""
    stages = [{k: v for k, v in vars(stage).items() if k != "slots"} for stage in getattr(optimizer, "stages", [])]
    found: list[Any] = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        for name, value in optimizer.state.get(p, {}).items():
            parts = (value.codes, value.scales) if isinstance(value, Quantized) else (value,)
            found += [(i, name), *(part.clone() for part in parts)]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [*found, len(optimizer.state), copy.deepcopy(groups), copy.deepcopy(stages)]


def assert_same(one: Sequence[Any], other: Sequence[Any]) -> None:
    assert len(one) == len(other)
    for x, y in zip(one, other, strict=True):
        if isinstance(x, Tensor):
            assert torch.equal(x, y)
        else:
            assert x == y


@contextlib.contextmanager
def failing(engine: str, error: type[BaseException], written: int = 0) -> Iterator[None]:
    """Let an engine fail once it has written so many batches; the reference, so many tensors."""
    owner, name = (reference._Call, "write") if engine == "reference" else (Plan, "write")
    write: Callable[..., Any] = getattr(owner, name)
    done = 0

    def fails(*args: Any, **given: Any) -> Any:
        nonlocal done
        done += 1
        if done > written:
            raise error("by the test")
        return write(*args, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(error, match="by the test"):
            yield


@every_optimizer
@pytest.mark.parametrize("taken", [0, 4])
def test_it_leaves_no_trace(name: str, engine: str, taken: int) -> None:
    """In the first step and in a later one: all is as before, and the next step goes on as if it had not been."""
    (optimizer, params), (other, others) = make(name, engine, 8), make(name, engine, 8)
    steps = list(gradients(taken + 4, [tuple(p.shape) for p in params], torch.float32))
    for step in range(taken):
        apply(optimizer, params, steps[step], step)
        apply(other, others, steps[step], step)
    for error in ERRORS:
        before = all_of(optimizer, params)
        with failing(engine, error):
            apply(optimizer, params, steps[taken], taken)
        if not optimizer.predicts():  # it moves before the closure runs
            assert_same(all_of(optimizer, params), before)
    for step in range(taken, len(steps)):
        apply(optimizer, params, steps[step], step)
        apply(other, others, steps[step], step)
    assert_same(all_of(optimizer, params), all_of(other, others))


@every_optimizer
def test_what_was_written_is_counted(name: str, engine: str) -> None:
    """Where it fails at a later parameter group, the counters of those that have moved go on, and no others."""
    params = make_params(SHAPES, torch.float32)
    key = "eps" if name == "prodigy" else "lr"  # it has one rate for all groups
    groups = [{"params": [p], key: 0.01 * (i + 1)} for i, p in enumerate(params)]
    optimizer = build(name, groups, engine=engine, **moving(name))
    for step, grads in enumerate(gradients(3, SHAPES, torch.float32)):
        apply(optimizer, params, grads, step)
    before = [p.detach().clone() for p in params]
    predicted = len(params) if optimizer.predicts() else 0
    with failing(engine, MemoryError, written=predicted + 1):
        apply(optimizer, params, next(gradients(1, SHAPES, torch.float32)), 3)
    counters = [int(optimizer.state[p]["step"]) for p in params]
    assert counters == [4, 3, 3]
    if not optimizer.predicts():
        assert [not torch.equal(p, x) for p, x in zip(params, before, strict=True)] == [True, False, False]
    apply(optimizer, params, next(gradients(1, SHAPES, torch.float32)), 4)
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 4, 4]


@pytest.mark.parametrize("name", [name for name in NAMES if OPTIMIZERS[name].predicts()])
def test_a_prediction_is_not_made_twice(name: str) -> None:
    """It moves the parameters before the closure, which may fail."""
    (optimizer, params), (other, others) = make(name, "auto"), make(name, "auto")
    for step, grads in enumerate(gradients(4, SHAPES, torch.float32)):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        apply(optimizer, params, grads, step)
        apply(other, others, grads, step)
    assert_same(all_of(optimizer, params), all_of(other, others))


@pytest.mark.parametrize("name", [name for name in NAMES if OPTIMIZERS[name].inputs])
def test_the_loss_of_a_failed_step_is_that_of_the_next(name: str) -> None:
    optimizer, params = make(name, "blocked")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.set_loss(2.0)
    with failing("blocked", MemoryError):
        optimizer.step()
    optimizer.step()  # it would miss its loss


def test_stages_on_an_optimizer_of_torch_do_not_count_it_either() -> None:
    p = torch.nn.Parameter(torch.ones(9))
    p.grad = torch.ones(9)
    optimizer = torch.optim.SGD([p], lr=0.1)
    stage = Average("mean")
    attach(stage, optimizer)
    with failing("blocked", MemoryError):
        optimizer.step()
    assert (stage.steps, stage.count) == (0, 0)
    optimizer.step()
    assert (stage.steps, stage.count) == (1, 1)
    assert torch.equal(optimizer.state[p]["average"], p)


needs_compiler = pytest.mark.skipif(bool(compiler.without_compiler()), reason="no C++ compiler")


class Broken:
    """A compiler that stops after some kernels."""

    def __init__(self, kernels: int) -> None:
        self.left, self.load = kernels, compiler.load

    def __call__(self, source: compiler.Source) -> Any:
        self.left -= 1
        if self.left < 0:
            raise EngineError("the disk is full.")
        return self.load(source)


@needs_compiler
@pytest.mark.parametrize("kernels", [0, 1, 2])
def test_another_engine_takes_over_from_a_compiler_that_stops(kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; in the first step, at the second group; and in a later one, in which Lookahead needs another kernel."""

    def trajectory(engine: str) -> tuple[Optimizer, Tensor]:
        params = make_params(SHAPES, torch.float32)
        groups = [{"params": params[:2]}, {"params": params[2:], "amsgrad": True}]
        optimizer = build("adamw", groups, engine=engine)
        optimizer.append(Lookahead(3, 0.5))
        found = []
        for step, grads in enumerate(gradients(7, SHAPES, torch.float32)):
            apply(optimizer, params, grads, step)
            found.append(flat(params))
            assert {int(state["step"]) for state in optimizer.state.values()} == {step + 1}
        return optimizer, torch.stack(found)

    _, right = trajectory("reference")
    monkeypatch.setattr(engines, "_told", set())
    monkeypatch.setattr(compiler, "load", Broken(kernels))
    with pytest.warns(
        UserWarning, match="another engine than 'compiled' runs the step, since the disk is full"
    ) as told:
        optimizer, found = trajectory("auto")
    assert len(told) == 1
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    assert "engine: blocked (the disk is full.)" in repr(optimizer)


@needs_compiler
@pytest.mark.parametrize("kernels", [0, 1])
def test_all_kernels_are_there_before_anything_is_written(kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was asked for fails in the first step as if it had not been called, and then goes on."""
    params = make_params(SHAPES, torch.float32)
    optimizer = build("lamb", [{"params": params[:2]}, {"params": params[2:], "state_bits": 8}], engine="compiled")
    before = all_of(optimizer, params)
    grads = next(gradients(1, SHAPES, torch.float32))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "load", Broken(kernels))
        with pytest.raises(OptionError, match="engine='compiled' cannot serve here: the disk is full"):
            apply(optimizer, params, grads)
    assert_same(all_of(optimizer, params), before)
    apply(optimizer, params, grads)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@needs_compiler
def test_an_interrupt_in_a_kernel_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is noticed when the kernel has returned: the weights have moved, and are counted."""
    params = make_params(SHAPES, torch.float32)
    optimizer = build("adamw", params, engine="compiled")
    call = compiled.BACKEND.call

    def interrupted(*args: Any) -> None:
        call(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(compiled.BACKEND, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(optimizer, params, next(gradients(1, SHAPES, torch.float32)))
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_a_triton_kernel_that_cannot_be_compiled_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself needs a C compiler, and says so only in a first call."""
    triton = engines.triton
    params = make_params(SHAPES, torch.float32)
    if refusal := triton.refusal(build("adamw", params).first_programs(), params):
        pytest.skip(refusal)

    def missing(*args: Any, **given: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(triton, "run_kernel", missing)
    asked = build("adamw", params, engine="triton")
    before = all_of(asked, params)
    with pytest.raises(OptionError, match=r"engine='triton' cannot serve here: .* Failed to find C compiler\. Use"):
        apply(asked, params, next(gradients(1, SHAPES, torch.float32)))
    assert_same(all_of(asked, params), before)
