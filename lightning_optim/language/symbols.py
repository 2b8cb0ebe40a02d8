"""Symbols: what an update is called on when it is read, and the state that it sees then."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lightning_optim.language.values import By, Over, Value


class Kind(enum.IntEnum):
    """How many values a symbol stands for, and so when it is known."""

    HOST = 0  # one number, known when the step begins
    SCALAR = 1  # one number per tensor or per optimizer, known after a pass
    ELEMENT = 2  # one number per element
    WHOLE = 3  # needs the whole tensor at once: a mean along an axis


class Symbol(Value):
    """One value of the update: an input, or a function of earlier symbols and numbers."""

    __slots__ = ("args", "kind", "level", "name", "tracer")

    def __init__(self, tracer: Tracer, name: str, args: tuple[Any, ...], kind: Kind, level: int) -> None:
        self.tracer, self.name, self.args, self.kind, self.level = tracer, name, args, kind, level

    def record(self, name: str, *args: Any) -> Symbol:
        symbols = [arg for arg in args if isinstance(arg, Symbol)]
        return self.tracer.symbol(name, args, max(s.kind for s in symbols), max(s.level for s in symbols))

    def reduce(self, over: Over, by: By) -> Symbol:
        kind = Kind.WHOLE if self.kind == Kind.WHOLE else Kind.SCALAR
        return self.tracer.symbol("total", (self, over, by), kind, self.level + 1)

    def mean(self, axis: Any) -> Symbol:
        return self.tracer.symbol("mean", (self, axis), Kind.WHOLE, self.level)

    def count(self, over: Over) -> Symbol:
        return self.tracer.symbol("count", (over,), Kind.SCALAR, 0)

    def normal(self, *counter: Any) -> Symbol:
        return self.tracer.symbol("normal", counter, Kind.ELEMENT, 0)

    def __bool__(self) -> bool:
        return self.tracer.is_nonzero(self)

    def __repr__(self) -> str:
        if self.name in ("host", "scalar", "element"):
            return str(self.args[0])
        return f"{self.name}({', '.join(map(repr, self.args))})"


def is_element(value: Any) -> bool:
    """Whether a value is a symbol with one number per element."""
    return isinstance(value, Symbol) and value.kind == Kind.ELEMENT


class Tracer:
    """Writes symbols down in the order in which they are made; equal expressions become one symbol."""

    def __init__(self) -> None:
        self.symbols: dict[tuple[Any, ...], Symbol] = {}
        self.values: dict[Symbol, float] = {}
        self.guards: dict[str, bool] = {}

    def symbol(self, name: str, args: tuple[Any, ...], kind: Kind, level: int) -> Symbol:
        key = (name, *args)
        if key not in self.symbols:
            self.symbols[key] = Symbol(self, name, args, kind, level)
        return self.symbols[key]

    def host(self, name: str, value: Any) -> Any:
        """A symbol for a float; a flag stays what it is; tuples and dicts become tuples and namespaces of these."""
        if isinstance(value, tuple):
            return tuple(self.host(f"{name}.{i}", item) for i, item in enumerate(value))
        if isinstance(value, dict):
            return SimpleNamespace(**{key: self.host(f"{name}.{key}", item) for key, item in value.items()})
        if isinstance(value, Tensor):  # a number on a device, which the host does not know
            return self.symbol("host", (name,), Kind.SCALAR, 0)
        if not isinstance(value, float):
            return value
        symbol = self.symbol("host", (name,), Kind.HOST, 0)
        self.values[symbol] = float(value)
        return symbol

    def is_nonzero(self, symbol: Symbol) -> bool:
        if symbol not in self.values:
            raise TypeError(
                f"an update cannot branch on {symbol!r}: its value is not known when the update is read. "
                "Use `where(condition, a, b)`, or a bool from `scalars`."
            )
        self.guards[symbol.args[0]] = self.values[symbol] != 0
        return self.guards[symbol.args[0]]


class State:
    """What an update sees as `s`: slots that read as their current value and take a new one.

    Args:
        read: Gives the value that a slot had before the step.
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
        """Whether the slot was read or written already: a stage so finds out what an update has."""
        return name in self.seen or name in self.written
