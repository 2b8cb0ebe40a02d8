"""The types of a page: values, options and slots.

A page is annotated with these types and runs on three kinds of values: tensors (in the reference engine), Python
numbers (the scalars of a step) and symbols (while the update is traced). Only symbols are instances of `Value`. For
tensors and numbers it exists for type checkers and editors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NoReturn, Protocol

from torch import Tensor

Over = Literal["tensor", "all"]
By = Literal["sum", "max"]
Number = Tensor | float  # a value in an engine


class Value:
    """A value of an update, with arithmetic and comparisons.

    The operators below are those of a symbol (`lightning_optim.language.symbols`), which records operations by `record`
    instead of computing them.
    """

    __slots__ = ()

    def record(self, name: str, *args: Any) -> Value:
        """Apply the elementary function `name` to `args`."""
        raise NotImplementedError

    def reduce(self, over: Over, by: By) -> Value:
        """The sum or the maximum of all elements."""
        raise NotImplementedError

    def mean(self, axis: Any) -> Value:
        """The mean along one axis."""
        raise NotImplementedError

    def count(self, over: Over) -> Value:
        """The number of elements of the tensor, or of all tensors of the step."""
        raise NotImplementedError

    def normal(self, *counter: Any) -> Value:
        """One normal number for each element."""
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

    def __bool__(self) -> NoReturn:
        """An update cannot branch on a value, which is unknown while the update is traced; use `where`."""
        raise NotImplementedError


Operand = Value | float
Condition = Value | bool


class Setting(Value):
    """The type of `h.name`: a number, a tuple of numbers, a bool, a string or None.

    It exists for type checkers and has no instances.
    """

    __slots__ = ()

    def __getitem__(self, index: int) -> Setting:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Setting]:
        raise NotImplementedError

    def __bool__(self) -> bool:  # type: ignore[override]  # pages may ask an option
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
    """`s`: the slots by name. Reading gives the current value, assignment sets a new one."""

    def __getattr__(self, name: str, /) -> Value: ...

    def __setattr__(self, name: str, value: Operand, /) -> None: ...

    def __contains__(self, name: str, /) -> bool:
        """Whether the update has read or written the slot. A stage asks this to find the slots of an optimizer."""
        ...
