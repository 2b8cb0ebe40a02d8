"""The functions that an update may use.

An update is ordinary Python over values that add, multiply and compare. Called on tensors, a function computes a
tensor; on Python numbers it computes in float64 (the scalars of a step); on symbols it is recorded, so that an update
can be traced (`lightning_optim.language.program`).

A reduction runs over the whole logical tensor, however it is sharded (`over="tensor"`), or over all tensors of the step
(`over="all"`). The engine adds up shards over ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lightning_optim.language.values import By, Condition, Number, Operand, Over, Setting, Value


@dataclass(frozen=True)
class Function:
    """One elementary function, on tensors and on Python numbers."""

    tensor: Callable[..., Tensor]
    number: Callable[..., Any]


def _divide(a: Any, b: Any) -> Any:
    """The quotient of two numbers as tensors divide: division by zero gives infinity or NaN and no error."""
    if b == 0 and isinstance(a, int | float):
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return a / b


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


# Elements beyond this are not squared: sums of 2^27 of their squares stay finite, also of nine times as much (Adan).
# Half precision is computed in float32.
LARGEST = {torch.float64: 2.0**500}
LARGEST_IN_FLOAT32 = 2.0**50


def _squarable(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`squarable`, which returns x itself or writes into `out`."""
    largest = LARGEST.get(x.dtype, LARGEST_IN_FLOAT32)
    # On a CPU one look at all elements is faster than to choose for each. On a GPU the host would have to wait for it.
    if x.device.type == "cpu" and float(torch.linalg.vector_norm(x)) <= largest:
        return x
    chosen = torch.where((x.abs() > largest) & x.isfinite(), 0.0, x)
    return chosen if out is None else out.copy_(chosen)


def _squarable_number(x: float) -> float:
    return 0.0 if LARGEST[torch.float64] < abs(x) < math.inf else x


# All functions of which a traced update consists, by the name under which they are recorded.
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
    "squarable": Function(_squarable, _squarable_number),
    "sign": Function(torch.sign, lambda a: float((a > 0) - (a < 0))),
    "maximum": Function(torch.maximum, max),
    "minimum": Function(torch.minimum, min),
    "lerp": Function(torch.lerp, lambda a, b, weight: a + weight * (b - a)),
    "where": Function(torch.where, _where),
    "gt": Function(torch.gt, lambda a, b: a > b),
    "ge": Function(torch.ge, lambda a, b: a >= b),
}


BOUNDS = {"maximum": "min", "minimum": "max"}


class Evaluation(Protocol):
    """The functions that an engine provides while it calls an update on tensors: reductions and normal numbers."""

    def total(self, x: Number, over: Over, by: By) -> Number: ...

    def count(self, over: Over) -> float: ...

    def mean(self, x: Tensor, axis: int | tuple[int, ...]) -> Tensor: ...

    def whole(self, function: Any, values: tuple[Tensor, ...], numbers: tuple[float, ...]) -> Tensor: ...

    def normal(self, seed_low: float, seed_high: float, t: float) -> Tensor: ...


_evaluation: ContextVar[Evaluation] = ContextVar("evaluation")  # each thread has its own


@contextlib.contextmanager
def evaluating(evaluation: Evaluation) -> Iterator[None]:
    """Compute reductions by `evaluation` inside this context."""
    token = _evaluation.set(evaluation)
    try:
        yield
    finally:
        _evaluation.reset(token)


def evaluation() -> Evaluation:
    """The functions of the engine that is calling the update."""
    return _evaluation.get()


def is_evaluating() -> bool:
    """Whether an engine is calling an update."""
    return _evaluation.get(None) is not None


def apply(name: str, *args: Any) -> Value:
    """Apply the elementary function `name`, or record it where an argument is a symbol."""
    for arg in args:
        if isinstance(arg, Value):
            return arg.record(name, *args)
    function = FUNCTIONS[name]
    result: Any
    like = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if like is None:
        result = function.number(*args)
    elif name in BOUNDS and not all(isinstance(arg, Tensor) for arg in args):
        number = args[0] if args[1] is like else args[1]
        result = like.clamp(**{BOUNDS[name]: number})  # torch.maximum takes only tensors
    else:
        result = function.tensor(*args)
    return cast(Value, result)


# ------------------------------------------------------------------ elementary functions


def sqrt(x: Operand) -> Value:
    """The square root."""
    return apply("sqrt", x)


def exp(x: Operand) -> Value:
    """e to the power of x."""
    return apply("exp", x)


def sign(x: Operand) -> Value:
    """-1, 0 or 1; the sign of 0 is 0."""
    return apply("sign", x)


def squarable(x: Operand) -> Value:
    """x, or 0 where x is finite and so large that sums of its square are not: above 2^50, in float64 above 2^500.

    Infinity and NaN stay what they are.
    """
    return apply("squarable", x)


def maximum(a: Operand, b: Operand) -> Value:
    """The larger of two values."""
    return apply("maximum", a, b)


def minimum(a: Operand, b: Operand) -> Value:
    """The smaller of two values."""
    return apply("minimum", a, b)


def clip(x: Operand, low: Operand, high: Operand) -> Value:
    """The value in [low, high] that is nearest to x."""
    return minimum(maximum(x, low), high)


def where(condition: Condition, a: Operand, b: Operand) -> Value:
    """`a` where the condition holds, else `b`. A Python bool selects one of them while the update is traced."""
    test: Any = condition
    if isinstance(test, bool):
        return cast(Value, _where(test, a, b))
    chosen: Any = a
    if isinstance(test, Tensor) and test.dim() == 0 and isinstance(a, float) and isinstance(b, float):
        chosen = torch.full((), a, dtype=torch.float64, device=test.device)  # of two floats torch would make float32
    return apply("where", test, chosen, b)


def lerp(a: Operand, b: Operand, weight: Operand) -> Value:
    """a + weight * (b - a)."""
    return apply("lerp", a, b, weight)


# ------------------------------------------------------------------ reductions


def total(x: Operand, over: Over = "tensor", by: By = "sum") -> Value:
    """The sum, or the maximum, of all elements of `x` over the whole tensor or over all tensors of the step."""
    return x.reduce(over, by) if isinstance(x, Value) else cast(Value, evaluation().total(x, over, by))


def count(x: Operand, over: Over = "tensor") -> Value:
    """The number of elements of the logical tensor, or of all tensors of the step."""
    return x.count(over) if isinstance(x, Value) else cast(Value, evaluation().count(over))


def mean(x: Operand, axis: int | tuple[int, ...] | Setting) -> Value:
    """The mean over one axis of the whole tensor, or several. Each stays, with size 1."""
    if isinstance(x, Value):
        return x.mean(axis)
    tensor: Any = x
    along: Any = axis
    return cast(Value, evaluation().mean(tensor, along))


def norm(x: Operand, over: Over = "tensor") -> Value:
    """The Euclidean norm."""
    return sqrt(total(x * x, over))


def rms(x: Operand, over: Over = "tensor") -> Value:
    """The root of the mean square: norm(x) / sqrt(count)."""
    return sqrt(total(x * x, over) / count(x, over))


# ------------------------------------------------------------------ random numbers


def normal(seed_low: Operand, seed_high: Operand, t: Operand) -> Value:
    """A standard normal number for each element (`lightning_optim.distributed.philox`).

    It depends on the seed, the step and the global index of the element alone, so it is the same on every rank, for
    every sharding and in every engine.

    Args:
        seed_low: The lower 32 bits of the seed, as a float.
        seed_high: The upper 32 bits of the seed, as a float.
        t: The step, as a float.
    """
    if isinstance(t, Value):
        return t.normal(seed_low, seed_high, t)
    low: Any = seed_low
    high: Any = seed_high
    return cast(Value, evaluation().normal(low, high, t))


# ------------------------------------------------------------------ functions of the step counter, for `scalars`


def hypot(a: Operand, b: Operand) -> Value:
    """sqrt(a² + b²)."""
    if isinstance(a, Value) or isinstance(b, Value):
        return sqrt(a * a + b * b)
    return cast(Value, math.hypot(a, b))


def log(x: Operand) -> Value:
    """The natural logarithm; minus infinity of 0."""
    number: Any = x
    return x.record("log", x) if isinstance(x, Value) else cast(Value, math.log(number) if number else -math.inf)


def is_odd(t: Operand) -> Value:
    """Whether a step counter is odd."""
    counter: Any = t
    return t.record("is_odd", t) if isinstance(t, Value) else cast(Value, counter % 2 == 1)
