"""Symbols, on which an update is traced, and the slots that it sees then."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lightning_optim.language.axes import as_axes
from lightning_optim.language.slot import Slot
from lightning_optim.language.values import By, Over, Value


class Kind(enum.IntEnum):
    """The number of values of a symbol, and when they are computed.

    A function has the highest kind of its arguments.
    """

    HOST = 0  # one number, which the host computes before the first pass
    SCALAR = 1  # one number per tensor or per optimizer, computed between passes
    STATISTIC = 2  # one number per row, per column, ...: a tensor with some axes of size 1, computed between passes
    ELEMENT = 3  # one number per element, computed in a pass
    MATRIX = 4  # a tensor of its own per matrix, for functions of whole matrices alone


class Symbol(Value):
    """A value of a traced update: an input, or a function of other symbols and numbers.

    Attributes:
        tracer: The tracer that recorded it.
        name: The name of the input ("host", "scalar", "statistic", "element", "matrix", "count", "normal") or of the
            function.
        args: The arguments of the function, or what tells one input from another.
        kind: The number of values, and when they are computed.
        level: The number of cuts (reductions, means along axes, functions of whole matrices) that must be computed one
            after another before it.
        axes: The axes of a statistic that have size 1; empty for every other kind.
    """

    __slots__ = ("args", "axes", "kind", "level", "name", "tracer")

    def __init__(
        self, tracer: Tracer, name: str, args: tuple[Any, ...], kind: Kind, level: int, axes: frozenset[Any]
    ) -> None:
        self.tracer, self.name, self.args, self.kind, self.level, self.axes = tracer, name, args, kind, level, axes

    def record(self, name: str, *args: Any) -> Symbol:
        symbols = [arg for arg in args if isinstance(arg, Symbol)]
        kind, level = max(s.kind for s in symbols), max(s.level for s in symbols)
        if kind == Kind.MATRIX:
            raise TypeError("a slot of a matrix has no value per element: only the function given to `whole` reads it.")
        axes = frozenset[Any]()
        if kind == Kind.STATISTIC:  # rows and columns together are elements
            axes = frozenset.intersection(*(s.axes for s in symbols if s.kind == kind))
            kind = kind if axes else Kind.ELEMENT
        return self.tracer.symbol(name, args, kind, level, axes)

    def reduce(self, over: Over, by: By) -> Symbol:
        if self.kind == Kind.STATISTIC:
            raise TypeError(f"{self!r} has one number per row or column, of which `mean` is taken and not `total`.")
        return self.tracer.symbol("total", (self, over, by), Kind.SCALAR, self.level + 1)

    def mean(self, axis: Any) -> Symbol:
        axes = as_axes(axis)
        if self.kind < Kind.STATISTIC or axes & self.axes:
            raise TypeError(f"{self!r} has no axis {axis} to take the mean along.")
        return self.tracer.symbol("mean", (self, axis), Kind.STATISTIC, self.level + 1, self.axes | axes)

    def count(self, over: Over) -> Symbol:
        return self.tracer.symbol("count", (over,), Kind.SCALAR, 0)

    def normal(self, *counter: Any) -> Symbol:
        return self.tracer.symbol("normal", counter, Kind.ELEMENT, 0)

    def __bool__(self) -> bool:  # type: ignore[override]  # for checkers it never answers; an option does
        return self.tracer.is_nonzero(self)

    def __repr__(self) -> str:
        if self.name in ("host", "scalar", "statistic", "element", "matrix"):
            return str(self.args[0])
        return f"{self.name}({', '.join(map(repr, self.args))})"


def is_element(value: Any) -> bool:
    """Whether a value is a symbol with one number per element."""
    return isinstance(value, Symbol) and value.kind == Kind.ELEMENT


def is_statistic(value: Any) -> bool:
    """Whether a value is a symbol with one number per row, per column, ..."""
    return isinstance(value, Symbol) and value.kind == Kind.STATISTIC


class Tracer:
    """Records the symbols of a trace in order. Equal expressions are one symbol.

    Attributes:
        symbols: The symbols by name and arguments.
        values: The values of the inputs that are floats, at the time of the trace.
        guards: The floats that were compared with zero, by name, and whether they were nonzero.
    """

    def __init__(self) -> None:
        self.symbols: dict[tuple[Any, ...], Symbol] = {}
        self.values: dict[Symbol, float] = {}
        self.guards: dict[str, bool] = {}

    def symbol(
        self, name: str, args: tuple[Any, ...], kind: Kind, level: int, axes: frozenset[Any] = frozenset()
    ) -> Symbol:
        key = (name, *args)
        if key not in self.symbols:
            self.symbols[key] = Symbol(self, name, args, kind, level, axes)
        return self.symbols[key]

    def slot(self, name: str, slot: Slot | None, h: Mapping[str, Any]) -> Symbol:
        """The symbol of a slot before the step: a number, a statistic or one value per element."""
        if slot is not None and slot.per == "matrix" and h.get("is_matrix", True):
            return self.symbol("matrix", (name,), Kind.MATRIX, 0)
        if slot is not None and slot.per in ("tensor", "optimizer"):
            return self.symbol("scalar", (name,), Kind.SCALAR, 0)
        if slot is not None and slot.without is not None:
            return self.symbol("statistic", (name,), Kind.STATISTIC, 0, as_axes(h[slot.without]))
        return self.symbol("element", (name,), Kind.ELEMENT, 0)

    def host(self, name: str, value: Any) -> Any:
        """A symbol for a float, any other value as it is. Tuples and dicts become tuples and namespaces of these."""
        if isinstance(value, tuple):
            return tuple(self.host(f"{name}.{i}", item) for i, item in enumerate(value))
        if isinstance(value, dict):
            return SimpleNamespace(**{key: self.host(f"{name}.{key}", item) for key, item in value.items()})
        if isinstance(value, Tensor):  # a number on a device, which the host must not read
            return self.symbol("host", (name,), Kind.SCALAR, 0)
        if not isinstance(value, float):
            return value
        symbol = self.symbol("host", (name,), Kind.HOST, 0)
        self.values[symbol] = float(value)
        return symbol

    def is_nonzero(self, symbol: Symbol) -> bool:
        """Whether the value of a float is nonzero. The result becomes a guard of the program."""
        if symbol not in self.values:
            raise TypeError(
                f"an update cannot branch on {symbol!r}: its value is not known when the update is read. "
                "Use `where(condition, a, b)`, or a bool from `scalars`."
            )
        self.guards[symbol.args[0]] = self.values[symbol] != 0
        return self.guards[symbol.args[0]]


class State:
    """The slots as an update sees them: reading gives the current value, assignment sets a new one.

    Args:
        read: A function that returns the value of a slot before the step.

    Attributes:
        seen: The values from before the step that were read, by name.
        written: The new values, by name.
    """

    seen: dict[str, Any]
    written: dict[str, Any]

    def __init__(self, read: Callable[[str], Any]) -> None:
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "seen", {})
        object.__setattr__(self, "written", {})

    def __getattr__(self, name: str) -> Any:
        if name in self.written:
            return self.written[name]
        if name not in self.seen:
            self.seen[name] = self._read(name)
        return self.seen[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.written[name] = value

    def __contains__(self, name: str) -> bool:
        """Whether the update has read or written the slot. A stage asks this to find the slots of an optimizer."""
        return name in self.seen or name in self.written
