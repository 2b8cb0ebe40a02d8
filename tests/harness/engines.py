"""What the tests of all engines share: tensors of all sizes, where two runs have come apart, and functions alike."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import kernel_checks
from lightning_optim import engines, storage
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.language.math import FUNCTIONS, Function
from lightning_optim.language.program import Program
from lightning_optim.storage import Quantized
from tests.harness.problems import NAMES, apply, build, gradients, make_params

SHAPES = ((0,), (1,), (7,), (255,), (257,), (64, 64), (5000,), (20, 30))  # the last one turned: not contiguous
SMALL = ((0,), (7,), (257,), (3, 1400))
# Adafactor's matrices keep nothing that can be quantized.
QUANTIZED = [
    name
    for name in NAMES
    if name != "adafactor" and any(storage.can_be_quantized(slot) for slot in OPTIMIZERS[name].slots.values())
]


INTERPRETED = ("adamw",)  # Triton's interpreter is slow, and its kernels are held to the reference elsewhere


def quantizes(name: str) -> bool:
    """Whether an optimizer has a slot that can be kept in 8 bits."""
    return any(storage.can_be_quantized(slot) for slot in OPTIMIZERS[name].slots.values())


def serves(engine: str, name: str) -> bool:
    """Whether an engine runs the update of an optimizer on this machine."""
    params = make_params(((3, 4),), torch.float32)
    return not engines.ENGINES[engine].refusal(build(name, params).first_programs(), params)


def serving(names: Sequence[str]) -> list[Any]:
    """Optimizers, each with each engine of the registry that serves it: parameters of a test."""
    found = []
    for name, engine in itertools.product(names, engines.ENGINES):
        if (engine == "triton" and name not in INTERPRETED) or not serves(engine, name):
            continue
        marks = () if engine == "reference" else (pytest.mark.engines,)
        found.append(pytest.param(name, engine, marks=marks, id=f"{name}-{engine}"))
    return found


def make(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, turned: bool = False) -> list[Tensor]:
    params = make_params(shapes, dtype)
    if turned:
        params[-1] = torch.nn.Parameter(params[-1].detach().t().contiguous().t())
    return params


def run(optimizer: Optimizer, params: Sequence[Tensor], steps: int, skip: int = 0) -> None:
    shapes = [tuple(p.shape) for p in params]
    for step, grads in enumerate(gradients(skip + steps, shapes, params[0].dtype)):
        if step >= skip:
            apply(optimizer, params, grads, step)


def steps_of_every_program(optimizer: Optimizer, params: Sequence[Tensor], least: int = 3) -> Iterator[int]:
    """Take steps in which an optimizer runs all its programs, also those of later steps, and say which, one by one."""
    shapes, steps, ran, every = [tuple(p.shape) for p in params], [1], set[Program](), set[Program]()
    for position, grads in enumerate(gradients(kernel_checks.MOST, shapes, params[0].dtype)):
        if position == len(steps):
            break
        kernel_checks.go_to(optimizer, steps[position])
        apply(optimizer, params, grads, steps[position])
        ran |= {batch.program for kept in optimizer._runner.cached.values() for batch in kept.batches}
        every |= kernel_checks.programs_of(optimizer)
        yield steps[position]
        steps += [] if position else kernel_checks.further_steps(optimizer, least)
    assert ran >= every, "a program was not run"


def run_every_program(optimizer: Optimizer, params: Sequence[Tensor], least: int = 3) -> None:
    for _ in steps_of_every_program(optimizer, params, least):
        pass


def flags(name: str) -> list[dict[str, Any]]:
    """The options of an optimizer that select another program than its defaults do, one by one."""
    found: list[dict[str, Any]] = []
    for option in OPTIMIZERS[name].options.values():
        kinds = typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else ()
        other = [not option.default] if option.type is bool else [kind for kind in kinds if kind != option.default]
        found += [{option.name: value} for value in other if not option.shared]
    return found


def differences(one: Optimizer, params: Sequence[Tensor], other: Optimizer, others: Sequence[Tensor]) -> list[str]:
    """Where two optimizers have come apart: names of what differs in any bit, and by how much."""
    found = []
    for p, q in zip(params, others, strict=True):
        pairs = [("p", p, q), *((key, value, other.state[q][key]) for key, value in one.state[p].items())]
        for key, x, y in pairs:
            parts = [(x.codes, y.codes), (x.scales, y.scales)] if isinstance(x, Quantized) else [(x, y)]
            for a, b in parts:
                if not torch.equal(a, b):
                    found.append(f"{key} of {tuple(p.shape)} by {(a.double() - b.double()).abs().max():.1e}")
    for key, value in one.shared_slots().items():
        if not torch.allclose(value, other.shared_slots()[key], rtol=1e-11, atol=0):
            found.append(key)
    return found


@pytest.fixture
def torch_functions(monkeypatch: pytest.MonkeyPatch, quiet_interpreter: None) -> None:
    """Let the interpreter take roots, exponentials and logarithms from torch.

    NumPy's differ from torch's in the last place on a CPU, where neither rounds all of them correctly. With the same
    functions below them everything else must agree bit for bit.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def use(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def run(self: Any, arg: Any) -> Any:
            values = np.ascontiguousarray(arg.data)
            return interpreter.TensorHandle(function(torch.from_numpy(values.copy())).numpy(), arg.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, run)

    functions = {"exp": torch.exp, "exp2": torch.exp2, "log2": torch.log2, "sqrt": torch.sqrt}
    for name, function in {**functions, "precise_sqrt": torch.sqrt}.items():
        use(f"create_{name}", function)


@pytest.fixture
def quiet_interpreter() -> Iterator[None]:
    """Let the interpreter divide by zero where the result is masked out."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def exact_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch round roots correctly, as processors do; its own are often a unit in the last place off.

    A root in float64 rounded to float32 is the correct one. With that, everything else must agree bit for bit.
    """
    root = torch.sqrt

    def exact(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        found = root(x.double()).to(x.dtype)
        return found if out is None else out.copy_(found)

    monkeypatch.setitem(FUNCTIONS, "sqrt", Function(exact, math.sqrt))
    monkeypatch.setattr(torch.Tensor, "sqrt", exact)
