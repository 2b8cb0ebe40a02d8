"""What an update sees, as types: values, options and slots.

A page is written against these types and runs on three kinds of values: tensors (engine "reference"), Python numbers
(the scalars of a step) and symbols (when the update is traced). Only symbols are instances of `Value`; for the other
two it is what a type checker and an editor know of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from torch import Tensor

Over = Literal["tensor", "all"]
By = Literal["sum", "max"]
Number = Tensor | float  # what engines compute with


class Value:
    """A quantity of an update: it adds, multiplies and compares.

    The operators below are those of a symbol (`lightning_optim.language.symbols`), which does not compute but writes
    down what is done to it, by `record`.
    """

    __slots__ = ()

    def record(self, name: str, *args: Any) -> Value:
        """The elementary function `name` of `args`."""
        raise NotImplementedError

    def reduce(self, over: Over, by: By) -> Value:
        """The sum or the maximum."""
        raise NotImplementedError

    def mean(self, axis: Any) -> Value:
        """The mean along one axis."""
        raise NotImplementedError

    def count(self, over: Over) -> Value:
        """The number of elements."""
        raise NotImplementedError

    def normal(self, *counter: Any) -> Value:
        """Normal numbers, one for each element."""
        raise NotImplementedError

    def __add__(self, other: Operand) -> Value:
        return self.record("add", self, other)

    def __radd__(self, other: Operand) -> Value:
        return self.record("add", other, self)

    def __sub__(self, other: Operand) -> Value:
        return self.record("sub", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self.record("sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.record("mul", self, other)

    def __rmul__(self, other: Operand) -> Value:
        return self.record("mul", other, self)

    def __truediv__(self, other: Operand) -> Value:
        return self.record("div", self, other)

    def __rtruediv__(self, other: Operand) -> Value:
        return self.record("div", other, self)

    def __pow__(self, other: Operand) -> Value:
        return self.record("pow", self, other)

    def __rpow__(self, other: Operand) -> Value:
        return self.record("pow", other, self)

    def __neg__(self) -> Value:
        return self.record("neg", self)

    def __abs__(self) -> Value:
        return self.record("abs", self)

    def __gt__(self, other: Operand) -> Value:
        return self.record("gt", self, other)

    def __ge__(self, other: Operand) -> Value:
        return self.record("ge", self, other)


Operand = Value | float
Condition = Value | bool


class Setting(Value):
    """What `h.name` is: a number or a tuple of numbers; or a flag, a word or None, asked by `if`, `==` and `given`.

    A type for checkers: nothing is an instance of it.
    """

    __slots__ = ()

    def __getitem__(self, place: int) -> Setting:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Setting]:
        raise NotImplementedError

    def __int__(self) -> int:
        raise NotImplementedError

    def __float__(self) -> float:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        raise NotImplementedError

    __hash__ = Value.__hash__


class Options(Protocol):
    """`h`: the options of a parameter group, its traits and the scalars of the step, by name."""

    def __getattr__(self, name: str, /) -> Setting: ...


class Slots(Protocol):
    """`s`: slots that read as their current value and take a new one by assignment."""

    def __getattr__(self, name: str, /) -> Value: ...

    def __setattr__(self, name: str, value: Any, /) -> None: ...

    def __contains__(self, name: str, /) -> bool:
        """Whether the update has touched the slot: so a stage finds out what an update has."""
        ...
