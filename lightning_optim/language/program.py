"""Traces an update on symbols, and stores what it does as a small graph: a `Program`.

The graph is data, so the facts that other libraries declare beside the update are read off it: which slots exist under
these options, how many bytes a step moves per element, what the update needs (a norm, the loss), and in how many passes
it runs. A float of the options or of the step is a symbol, and its value is filled in at run time. A bool, a string,
None or an int selects a program. The only condition on a float that an update may test is whether it is zero (`if
h.momentum:`). The result becomes part of the key of the program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from lightning_optim.language.axes import as_axes
from lightning_optim.language.math import FUNCTIONS
from lightning_optim.language.slot import Slot
from lightning_optim.language.symbols import Kind, State, Symbol, Tracer, is_element, is_statistic
from lightning_optim.language.values import By, Options

CUTS = ("total", "mean", "whole")  # symbols that need other elements of their tensor, and so an earlier pass

# An update as engines call it, on tensors or symbols; a page writes it as (Value, Value, Slots, Options) -> Value.
Update = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Program:
    """An update as data, for one choice of flags.

    Attributes:
        update: The update itself, to be called on tensors as `update(p, g, s, h)`.
        symbols: All symbols, in an order in which each comes after its arguments.
        outputs: The new value of the parameter (under `"p"`) and of every slot that is written, by name.
        reads: Names of the per-element inputs that are read: `"p"`, `"g"` and slots.
        slots: Names of all slots that are read or written.
        guards: The floats that the update compared with zero, by name, and whether they were nonzero.
        step_counter: The symbol of the step counter where its value is on a device (`capturable`), else None.
        reductions: The sums and maxima, in the order in which the update computes them.
    """

    update: Update
    symbols: tuple[Symbol, ...]
    outputs: dict[str, Any]
    reads: frozenset[str]
    slots: frozenset[str]
    guards: dict[str, bool]
    step_counter: Symbol | None
    reductions: tuple[Symbol, ...]

    @functools.cached_property
    def statistics(self) -> tuple[Symbol, ...]:
        """The symbols with one number per row or per column, which are computed between passes, arguments first."""
        return tuple(symbol for symbol in self.symbols if symbol.kind == Kind.STATISTIC)

    @functools.cached_property
    def matrices(self) -> tuple[Symbol, ...]:
        """The functions of whole matrices, arguments first. Later passes read their results as operands."""
        return tuple(symbol for symbol in self.symbols if symbol.name == "whole")

    @functools.cached_property
    def of_matrices(self) -> tuple[Symbol, ...]:
        """The new values of slots of matrices, which are written where functions of them are computed."""
        return tuple(symbol for symbol in self.symbols if symbol.kind == Kind.MATRIX)

    @functools.cached_property
    def buffers(self) -> dict[str, Symbol]:
        """The per-element arguments of functions of whole matrices, by the name of the buffer that holds each.

        The buffer of the first argument of a function then holds its result.
        """
        found = {}
        for i, symbol in enumerate(self.matrices):
            function, *values = symbol.args
            for j, value in enumerate(values[: len(values) - len(function.numbers)]):
                found[f"whole{i}_{j}" if j else f"whole{i}"] = value
        return found

    def arguments(self, level: int) -> tuple[str, ...]:
        """The buffers of the functions of whole matrices of a level."""
        levels = {name: symbol.level for symbol, name in self.results.items()}
        return tuple(name for name in self.buffers if levels[name.partition("_")[0]] == level)

    @functools.cached_property
    def results(self) -> dict[Symbol, str]:
        """The functions of whole matrices with the name of the buffer that holds the result of each."""
        return {symbol: f"whole{i}" for i, symbol in enumerate(self.matrices)}

    def operand(self, symbol: Symbol) -> str | None:
        """The name of the operand in which a pass finds the values of a symbol; None for one that it computes."""
        return symbol.args[0] if symbol.name == "element" else self.results.get(symbol)

    def value(self, name: str) -> Any:
        """What a pass stores in an output or a buffer."""
        return self.buffers[name] if name in self.buffers else self.outputs[name]

    @functools.cached_property
    def elementwise(self) -> bool:
        """Whether the update can run on blocks of elements: apart from reductions, no element depends on another."""
        return not (self.statistics or self.matrices)

    @functools.cached_property
    def writes(self) -> frozenset[str]:
        """Names of the outputs with one value per element: the parameter and slots."""
        return frozenset(
            name for name, value in self.outputs.items() if isinstance(value, Symbol) and value.kind == Kind.ELEMENT
        )

    @functools.cached_property
    def normals(self) -> tuple[Symbol, ...]:
        """The symbols of normal numbers. Engines need the global indices of elements to compute them."""
        return tuple(symbol for symbol in self.symbols if symbol.name == "normal")

    @functools.cached_property
    def moving(self) -> tuple[str, ...]:
        """Names of the per-element outputs that change, which the last pass writes."""

        def moves(value: Symbol, name: str) -> bool:
            return not (value.name == "element" and value.args[0] == name)

        return tuple(n for n, value in self.outputs.items() if n in self.writes and moves(value, n))

    @functools.cached_property
    def scalars(self) -> tuple[Symbol, ...]:
        """The symbols with one number per tensor or per optimizer, arguments first."""
        return tuple(symbol for symbol in self.symbols if symbol.kind == Kind.SCALAR)

    @functools.cached_property
    def counts(self) -> bool:
        """Whether the update uses a number of elements."""
        return any(symbol.name == "count" for symbol in self.symbols)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the per-element inputs and outputs: `"p"`, `"g"` where it is read, and slots, sorted."""
        slots = sorted({*self.reads, *self.writes} - {"p", "g"})
        return ("p", *(["g"] if "g" in self.reads else []), *slots)

    def elements(self, values: Iterable[Any]) -> list[Symbol]:
        """The per-element symbols on which some values depend, arguments first."""
        found: set[Symbol] = set()
        waiting = list(values)
        while waiting:
            symbol = waiting.pop()
            if isinstance(symbol, Symbol) and is_element(symbol) and symbol not in found:
                found.add(symbol)
                waiting += symbol.args if symbol.name != "whole" else ()  # an input of the pass
        return [symbol for symbol in self.symbols if symbol in found]

    def statistics_of(self, values: Iterable[Any]) -> list[Symbol]:
        """The statistics that a pass reads to compute some values."""
        computed = (symbol for symbol in self.elements(values) if symbol.name != "whole")
        return list(dict.fromkeys(arg for symbol in computed for arg in symbol.args if is_statistic(arg)))

    @functools.cached_property
    def _on_host(self) -> list[tuple[Symbol, Callable[..., Any] | None, tuple[Any, ...]]]:
        """The symbols that depend only on options and scalars, the function that computes each, and its arguments."""
        found = [symbol for symbol in self.symbols if symbol.kind == Kind.HOST]
        return [(x, None if x.name == "host" else FUNCTIONS[x.name].number, x.args) for x in found]

    def numbers(self, h: Mapping[str, Any]) -> dict[Symbol, Any]:
        """The values of the symbols that depend only on options and scalars of a step.

        Args:
            h: The options, traits and scalars of the step, by name.
        """
        values: dict[Symbol, Any] = {}
        for symbol, function, args in self._on_host:
            if function is None:
                values[symbol] = float(look_up(h, args[0]))
            else:
                values[symbol] = function(*[values[arg] if type(arg) is Symbol else arg for arg in args])
        return values

    @functools.cached_property
    def levels(self) -> int:
        """The number of levels of cuts: those of one level need only results of lower levels."""
        return max((symbol.level for symbol in self.symbols if symbol.name in CUTS), default=0)

    def sums(self, level: int) -> list[tuple[tuple[Any, ...], Symbol]]:
        """The reductions of a level, each with its key.

        A reduction over all tensors runs over all batches of a step, whose programs may differ. Reductions with equal
        keys are combined: the first sum over all tensors of one program with the first of another, and so on.

        Args:
            level: The level, from 1 to `levels`.

        Returns:
            Pairs of a key `(over, by, i)` and a symbol, which is number `i` of the reductions of this level with this
            `over` and `by`.
        """
        wanted = [symbol for symbol in self.reductions if symbol.level == level]
        kinds = [symbol.args[1:] for symbol in wanted]
        return [((*kind, kinds[:i].count(kind)), wanted[i]) for i, kind in enumerate(kinds)]

    def summands(self, level: int, by: By) -> tuple[Symbol, ...]:
        """The per-element symbols that the reductions `by` of a level sum, or take the maximum of."""
        wanted = (symbol for symbol in self.reductions if symbol.level == level and symbol.args[2] == by)
        return tuple(symbol.args[0] for symbol in wanted if is_element(symbol.args[0]))

    def means(self, level: int) -> tuple[Symbol, ...]:
        """The means along axes of a level."""
        return tuple(symbol for symbol in self.symbols if symbol.name == "mean" and symbol.level == level)

    def averaged(self, level: int) -> tuple[Symbol, ...]:
        """The means of a level whose arguments have one value per element, so that a pass adds them up."""
        return tuple(symbol for symbol in self.means(level) if is_element(symbol.args[0]))

    @functools.cached_property
    def axes(self) -> tuple[frozenset[Any], ...]:
        """The sets of axes of the statistics that passes read or add up towards."""
        read = self.statistics_of(self.symbols)
        added = (symbol for level in range(1, self.levels + 1) for symbol in self.averaged(level))
        return tuple(dict.fromkeys(symbol.axes for symbol in (*read, *added)))

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        """What the update needs besides single elements (norms, means, the loss), in words."""
        found = [_need(symbol) for symbol in self.symbols]
        return tuple(dict.fromkeys(need for need in found if need))


def _need(symbol: Symbol) -> str | None:
    if symbol.name == "total":
        return "norm of all tensors" if symbol.args[1] == "all" else "norm of each tensor"
    if symbol.name == "mean":
        return "row and column means"
    if symbol.name == "whole":
        return "whole matrix"
    if symbol.name == "host" and symbol.args[0] in ("loss", "loss_second_moment"):
        return "loss"
    return None


def trace(
    update: Update,
    h: Mapping[str, Any],
    slots: Mapping[str, Slot] | None = None,
) -> Program:
    """Call `update` once on symbols and return what it did.

    Args:
        update: A function of the parameter, the gradient, the slots and the options that returns the new parameter.
        h: The options, traits and scalars of a step, by name. Floats become symbols, other values select the program.
        slots: The declarations of slots by name. One that is not here has one value per element.
    """
    tracer, declared = Tracer(), slots or {}
    p = tracer.symbol("element", ("p",), Kind.ELEMENT, 0)
    g = tracer.symbol("element", ("g",), Kind.ELEMENT, 0)
    s = State(lambda name: tracer.slot(name, declared.get(name), h))
    new = update(p, g, s, SimpleNamespace(**{name: tracer.host(name, value) for name, value in h.items()}))
    outputs = {"p": new, **{name: value for name, value in s.written.items() if value is not s.seen.get(name)}}
    for name, value in outputs.items():
        _check_shape(name, value, declared.get(name), h)
    step_counter = tracer.symbols.get(("host", "t"))
    step_counter = step_counter if step_counter is not None and step_counter.kind == Kind.SCALAR else None
    symbols = _reachable([*outputs.values(), *([] if step_counter is None else [step_counter])])
    return Program(
        update=update,
        symbols=symbols,
        outputs=outputs,
        reads=frozenset(symbol.args[0] for symbol in symbols if symbol.name == "element"),
        slots=frozenset(s.seen) | frozenset(s.written),
        guards=tracer.guards,
        step_counter=step_counter,
        reductions=tuple(symbol for symbol in symbols if symbol.name == "total"),
    )


def _check_shape(name: str, value: Any, slot: Slot | None, h: Mapping[str, Any]) -> None:
    """Refuse a value with more numbers than its slot."""
    if slot is None or slot.without is None or not isinstance(value, Symbol) or value.kind < Kind.STATISTIC:
        return
    if not as_axes(h[slot.without]) <= value.axes:
        raise TypeError(f"the slot {name} has size 1 along {slot.without}, and the update assigns {value!r} to it.")


def _reachable(outputs: Iterable[Any]) -> tuple[Symbol, ...]:
    """The symbols that the outputs depend on, arguments first."""
    found: dict[Symbol, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Symbol) and value not in found:
            for arg in value.args:
                visit(arg)
            found[value] = None

    for output in outputs:
        visit(output)
    return tuple(found)


def namespace(h: Mapping[str, Any]) -> Options:
    """The options and scalars of a step as an update sees them: `h.lr`, and `h.average.weight` for a stage."""
    values: Any = {key: namespace(item) if isinstance(item, dict) else item for key, item in h.items()}
    return cast(Options, SimpleNamespace(**values))


def look_up(h: Mapping[str, Any], name: str) -> Any:
    """The value behind a symbol's name: `lr`, `betas.0` for an item of a tuple, `average.weight` for a stage's."""
    head, _, rest = name.partition(".")
    if not rest:
        return h[head]
    return h[head][rest] if isinstance(h[head], dict) else h[head][int(rest)]
