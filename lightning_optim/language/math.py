"""The functions an update may use.

An update is ordinary Python over values that add, multiply and compare. Each function here takes whatever it is
given: on tensors it computes, on Python numbers it computes in float64 (the scalars of a step), and on symbols it
records itself, which is how an engine reads the update (`lightning_optim.language.program`).

A reduction says over what it runs: `over="tensor"` is the whole logical tensor, however it is sharded, and
`over="all"` is every tensor that takes part in this step. Who sums what over which ranks is the engine's business.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Value = Any  # a tensor, a Python number, or a symbol of `language.program`
Over = Literal["tensor", "all"]
By = Literal["sum", "max"]


@dataclass(frozen=True)
class Function:
    """One elementary function, on tensors and on Python numbers."""

    tensor: Callable[..., Tensor]
    number: Callable[..., Any]


def _divide(a: Any, b: Any) -> Any:
    """A quotient of numbers as tensors divide: by zero it is infinite, or not a number, and no error."""
    if b == 0 and isinstance(a, int | float):
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return a / b


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


# Everything that a traced update can consist of. Engines look here for what a recorded name means.
FUNCTIONS: dict[str, Function] = {
    "add": Function(torch.add, lambda a, b: a + b),
    "sub": Function(torch.sub, lambda a, b: a - b),
    "mul": Function(torch.mul, lambda a, b: a * b),
    "div": Function(torch.div, _divide),
    "pow": Function(torch.pow, lambda a, b: a**b),
    "neg": Function(torch.neg, lambda a: -a),
    "abs": Function(torch.abs, abs),
    "sqrt": Function(torch.sqrt, math.sqrt),
    "exp": Function(torch.exp, math.exp),
    "sign": Function(torch.sign, lambda a: float((a > 0) - (a < 0))),
    "maximum": Function(torch.maximum, max),
    "minimum": Function(torch.minimum, min),
    "lerp": Function(torch.lerp, lambda a, b, weight: a + weight * (b - a)),
    "where": Function(torch.where, _where),
    "gt": Function(torch.gt, lambda a, b: a > b),
    "ge": Function(torch.ge, lambda a, b: a >= b),
}


BOUNDS = {"maximum": "min", "minimum": "max"}


class Recorder:
    """A value that writes down what is done to it instead of computing: a symbol of `language.program`."""

    def record(self, name: str, *args: Value) -> Value:
        raise NotImplementedError

    def reduce(self, over: Over, by: By) -> Value:
        raise NotImplementedError

    def mean(self, axis: int) -> Value:
        raise NotImplementedError

    def count(self, over: Over) -> Value:
        raise NotImplementedError

    def normal(self, *counter: Value) -> Value:
        raise NotImplementedError


class Evaluation(Protocol):
    """What an engine that calls an update on tensors answers when the update asks for a reduction."""

    def total(self, x: Value, over: Over, by: By) -> Value: ...

    def count(self, over: Over) -> float: ...

    def mean(self, x: Tensor, axis: int) -> Tensor: ...

    def normal(self, seed_low: float, seed_high: float, t: float) -> Tensor: ...


_evaluations: list[Evaluation] = []


@contextlib.contextmanager
def evaluating(evaluation: Evaluation) -> Iterator[None]:
    """Let `evaluation` answer the reductions of the update that is called inside."""
    _evaluations.append(evaluation)
    try:
        yield
    finally:
        _evaluations.pop()


def apply(name: str, *args: Value) -> Value:
    """Apply the elementary function `name`, or record it where an argument is a symbol."""
    for arg in args:
        if isinstance(arg, Recorder):
            return arg.record(name, *args)
    function = FUNCTIONS[name]
    like = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if like is None:
        return function.number(*args)
    if name in BOUNDS and not all(isinstance(arg, Tensor) for arg in args):
        number = args[0] if args[1] is like else args[1]
        return like.clamp(**{BOUNDS[name]: number})  # torch.maximum wants tensors on both sides
    return function.tensor(*args)


def sqrt(x: Value) -> Value:
    return apply("sqrt", x)


def exp(x: Value) -> Value:
    return apply("exp", x)


def sign(x: Value) -> Value:
    """-1, 0 or 1; the sign of 0 is 0."""
    return apply("sign", x)


def maximum(a: Value, b: Value) -> Value:
    return apply("maximum", a, b)


def minimum(a: Value, b: Value) -> Value:
    return apply("minimum", a, b)


def where(condition: Value, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`. A Python bool chooses one of them outright."""
    if isinstance(condition, bool):
        return _where(condition, a, b)
    if isinstance(condition, Tensor) and condition.dim() == 0 and isinstance(a, float) and isinstance(b, float):
        a = torch.tensor(a, dtype=torch.float64, device=condition.device)  # torch takes two bare numbers for float32
    return apply("where", condition, a, b)


def lerp(a: Value, b: Value, weight: Value) -> Value:
    """a + weight * (b - a)."""
    return apply("lerp", a, b, weight)


def ema(average: Value, x: Value, beta: Value) -> Value:
    """One step of an exponential moving average: beta * average + (1 - beta) * x."""
    return lerp(average, x, 1 - beta)


def decayed(p: Value, g: Value, h: Any, decoupled: bool) -> tuple[Value, Value]:
    """Weight decay before the step: on the parameter (decoupled) or added to the gradient (coupled, L2)."""
    return (p * (1 - h.lr * h.weight_decay), g) if decoupled else (p, g + h.weight_decay * p)


def total(x: Value, over: Over = "tensor", by: By = "sum") -> Value:
    """The sum, or the maximum, of all elements of `x` over the whole tensor or over all tensors of the step."""
    return x.reduce(over, by) if isinstance(x, Recorder) else _evaluations[-1].total(x, over, by)


def count(x: Value, over: Over = "tensor") -> Value:
    """The number of elements of the logical tensor, or of all tensors of the step."""
    return x.count(over) if isinstance(x, Recorder) else _evaluations[-1].count(over)


def mean(x: Value, axis: int) -> Value:
    """The mean over one axis of the whole tensor; the axis stays, with size 1."""
    return x.mean(axis) if isinstance(x, Recorder) else _evaluations[-1].mean(x, axis)


def normal(seed_low: Value, seed_high: Value, t: Value) -> Value:
    """A standard normal number for each element (`lightning_optim.distributed.philox`).

    It belongs to the element and the step: every rank, sharding and engine finds the same.

    Args:
        seed_low: The lower 32 bits of the seed, as a float, which holds them.
        seed_high: The upper 32 bits.
        t: The step.
    """
    return (
        t.normal(seed_low, seed_high, t) if isinstance(t, Recorder) else _evaluations[-1].normal(seed_low, seed_high, t)
    )


def norm(x: Value, over: Over = "tensor") -> Value:
    """The Euclidean norm."""
    return sqrt(total(x * x, over))


def rms(x: Value, over: Over = "tensor") -> Value:
    """The root of the mean square: norm(x) / sqrt(count)."""
    return sqrt(total(x * x, over) / count(x, over))
