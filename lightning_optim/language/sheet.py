"""Prints a traced function line by line: which values get a line of their own, and which letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from lightning_optim.language.expressions import Writer
from lightning_optim.language.notation import TEXT, Unicode
from lightning_optim.language.symbols import Symbol

INPUTS = ("host", "scalar", "element", "count")
CONDITIONS = ("gt", "ge", "is_odd")
LONG = 80  # a line above this length is split: a named value in it gets its own line
SHORT = 7  # values up to this length are written out wherever they occur


class Traced(Protocol):
    """A traced function, `update` or `predict`.

    Attributes:
        outputs: New values by the name of the slot, in order of assignment, and last the parameter, as "p".
        names: Names of intermediate values.
        predicted: For `update`: names of the slots and the parameter that `predict` has set before it.
        corrected: Names of what both `predict` and `update` set. The letters of predicted values have a bar.
        predicts: Whether this is `predict`.
    """

    outputs: dict[str, Any]
    names: dict[Symbol, str]
    predicted: frozenset[str]
    corrected: frozenset[str]
    predicts: bool


class Letters(Protocol):
    """The letters of options, slots and local variables."""

    slots: dict[str, Any]

    def letter(self, name: str) -> str: ...

    def note_use(self, name: str) -> None:
        """Note that an option occurs in a line."""
        ...


class Sheet(Writer):
    """The lines of one traced function."""

    def __init__(self, traced: Traced, letters: Letters) -> None:
        self.traced, self.letters, self.notation, self.assumed = traced, letters, TEXT, {}
        self.parents = count_parents(traced.outputs.values())
        self.current: Any = None  # the value of the current line
        self.slot_of: dict[Symbol, str] = {}  # new values of slots, which have their own lines
        self.local_of: dict[Symbol, str] = {}  # local variables that have their own lines
        for name, value in traced.outputs.items():
            if is_derived(value) and name != "p":
                self.slot_of.setdefault(value, name)
        for value in traced.names:
            if value in self.parents and value not in self.slot_of and self._deserves_a_line(value):
                self._give_line(value)
        while any(self._cut(value) for value, line in self._write() if longest(line) > LONG):
            pass

    def lines(self, notation: Unicode) -> list[str]:
        """The lines in an order in which each comes after those whose letters it uses."""
        self.notation = notation
        return [line for _, line in self._write()]

    def _write(self) -> list[tuple[Any, str]]:
        found: dict[str, tuple[Any, str]] = {}

        def define(value: Any, letter: str) -> None:
            for named in self._named_in(value):
                define(named, self.letter_of(named))
            self.current = value
            right = self.write(value)
            self.current = None
            if letter not in found and right != letter:
                found[letter] = value, self.notation.equation(letter, right)

        for name, value in self.traced.outputs.items():
            letter = self._new(name)
            if self.slot_of.get(value, name) != name:  # two slots with one value
                found[letter] = value, self.notation.equation(letter, self.letter_of(value))
            else:
                define(value, letter)
        return list(found.values())

    def _deserves_a_line(self, value: Symbol) -> bool:
        if value.name in CONDITIONS:
            return False
        if self.traced.names[value] == "g":  # the gradient with a penalty
            return True
        self.current = value
        length = len(self.write(value))
        self.current = None
        inner_choice = value.name == "where" and value is not self.traced.outputs["p"]
        return (self.parents[value] > 1 and length > SHORT) or (inner_choice and length > 24)

    def _cut(self, value: Any) -> bool:
        """Give the longest named value in a line its own line. Returns whether it could."""
        sizes = {
            named: len(self.write(named))
            for named in self._written_out_in(value)
            if named in self.traced.names and named.name not in CONDITIONS
        }
        if max(sizes.values(), default=0) < 24:
            return False
        return self._give_line(max(sizes, key=lambda named: sizes[named]))

    def _give_line(self, value: Symbol) -> bool:
        """Give a named value its own line unless its letter is taken. Returns whether it has one."""
        name = self.traced.names[value]
        taken = {*map(self.letters.letter, [*self.local_of.values(), *self.slot_of.values()])}
        if self.letters.letter(name) in taken:
            return False
        self.local_of[value] = name
        return True

    def _written_out_in(self, value: Any) -> Iterator[Symbol]:
        for arg in arguments(value):
            if not self.has_letter(arg):
                yield arg
                yield from self._written_out_in(arg)

    def _named_in(self, value: Any) -> Iterator[Symbol]:
        for arg in arguments(value):
            if self.has_letter(arg):
                yield arg
            else:
                yield from self._named_in(arg)

    # ------------------------------------------------------------------ letters

    def has_letter(self, value: Symbol) -> bool:
        return value is not self.current and (value in self.slot_of or value in self.local_of)

    def letter_of(self, value: Symbol) -> str:
        if value in self.slot_of:
            return self._new(self.slot_of[value])
        name = self.local_of[value]
        letter = self.letters.letter(name) + ("′" if name == "p" else "")
        return self.notation.letter(letter, "t" if depends_on_time(value) else "")

    def input(self, name: str) -> str:
        letter = self.letters.letter(name)
        if name == "g":
            taken = {*self.local_of.values(), *map(self.letters.letter, self.slot_of.values())}
            return self.notation.letter("∇f" if letter in taken else letter, "t")
        if name in self.traced.predicted:
            return self.notation.letter(barred(letter) if name in self.traced.corrected else letter, "t")
        slot = self.letters.slots.get(name)
        if slot is not None and slot.copies and name not in self.traced.outputs:
            self.letters.note_use(name)
            return self.notation.letter(letter)
        if name == "p" or slot is not None:
            return self.notation.letter(letter, "t-1")
        self.letters.note_use(name)
        return self.notation.letter(letter)

    def _new(self, name: str) -> str:
        letter = self.letters.letter(name)
        bar = self.traced.predicts and name in self.traced.corrected
        return self.notation.letter(barred(letter) if bar else letter, "t")


def is_derived(value: Any) -> bool:
    """Whether a value is computed: neither an input nor a plain number."""
    return isinstance(value, Symbol) and value.name not in INPUTS


def arguments(value: Any) -> list[Symbol]:
    """The symbols from which a value is computed."""
    return [arg for arg in value.args if isinstance(arg, Symbol)] if isinstance(value, Symbol) else []


def reachable(values: Iterable[Any]) -> dict[Symbol, None]:
    """All symbols that some values depend on, these included."""
    found: dict[Symbol, None] = {}
    waiting = [value for value in values if isinstance(value, Symbol)]
    while waiting:
        value = waiting.pop()
        if value not in found:
            found[value] = None
            waiting.extend(arguments(value))
    return found


def count_parents(outputs: Iterable[Any]) -> Counter[Symbol]:
    """For each value, the number of values that are computed from it."""
    values = reachable(outputs)
    return Counter({value: 0 for value in values}) + Counter(arg for value in values for arg in set(arguments(value)))


def depends_on_time(value: Symbol) -> bool:
    """Whether a value changes from step to step even if options stay the same."""
    found = reachable([value])
    return any(symbol.name in ("element", "scalar", "total") or symbol.args == ("t",) for symbol in found)


def barred(letter: str) -> str:
    """The letter of a predicted value."""
    return f"{letter[:1]}\u0304{letter[1:]}"


def longest(text: str) -> int:
    """The length of the longest line."""
    return max(map(len, text.splitlines()))
