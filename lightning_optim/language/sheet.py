"""A traced function written down line by line: which values get a line of their own, and by which letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from lightning_optim.language.expressions import Writer
from lightning_optim.language.notation import TEXT, Unicode
from lightning_optim.language.symbols import Symbol

INPUTS = ("host", "scalar", "element", "count")
CONDITIONS = ("gt", "ge", "is_odd")
LONG = 80  # a line above this gets a line for one of its named parts
SHORT = 7  # what is below this is written out wherever it occurs


class Traced(Protocol):
    """What a sheet is written from.

    Attributes:
        outputs: New values by the name of the slot, in order of assignment; last the parameter, as "p".
        names: Names of intermediate values.
        predicted: Names of what the prediction before the gradient has set already, in the part that comes after it.
        corrected: Names of what a prediction sets and the update sets again, so that their predicted value has a bar.
        predicts: Whether this is that prediction.
    """

    outputs: dict[str, Any]
    names: dict[Symbol, str]
    predicted: frozenset[str]
    corrected: frozenset[str]
    predicts: bool


class Letters(Protocol):
    """Who knows the letter of an option, a slot or a local variable."""

    slots: dict[str, Any]

    def letter(self, name: str) -> str: ...

    def note_use(self, name: str) -> None:
        """An option occurs in a line."""
        ...


class Sheet(Writer):
    """The lines of one traced function."""

    def __init__(self, part: Traced, letters: Letters) -> None:
        self.part, self.letters, self.notation, self.assumed = part, letters, TEXT, {}
        self.parents = count_parents(part.outputs.values())
        self.current: Any = None  # the value whose line is being written
        self.slot_of: dict[Symbol, str] = {}  # values that have a line of their own: new values of slots,
        self.local_of: dict[Symbol, str] = {}  # and local variables
        for name, value in part.outputs.items():
            if is_derived(value) and name != "p":
                self.slot_of.setdefault(value, name)
        for value in part.names:
            if value in self.parents and value not in self.slot_of and self._deserves_a_line(value):
                self._give_line(value)
        while any(self._cut(value) for value, line in self._write() if longest(line) > LONG):
            pass

    def lines(self, notation: Unicode) -> list[str]:
        """The lines, each after those whose letters it uses."""
        self.notation = notation
        return [line for _, line in self._write()]

    def _write(self) -> list[tuple[Any, str]]:
        found: dict[str, tuple[Any, str]] = {}

        def define(value: Any, letter: str) -> None:
            for part in self._named_in(value):
                define(part, self.letter_of(part))
            self.current = value
            right = self.write(value)
            self.current = None
            if letter not in found and right != letter:
                found[letter] = value, self.notation.equation(letter, right)

        for name, value in self.part.outputs.items():
            letter = self._new(name)
            if self.slot_of.get(value, name) != name:  # two slots with one value
                found[letter] = value, self.notation.equation(letter, self.letter_of(value))
            else:
                define(value, letter)
        return list(found.values())

    def _deserves_a_line(self, value: Symbol) -> bool:
        if value.name in CONDITIONS:
            return False
        if self.part.names[value] == "g":  # the gradient with a penalty
            return True
        self.current = value
        length = len(self.write(value))
        self.current = None
        inner_choice = value.name == "where" and value is not self.part.outputs["p"]
        return (self.parents[value] > 1 and length > SHORT) or (inner_choice and length > 24)

    def _cut(self, value: Any) -> bool:
        """Give the longest named part of a line a line of its own; whether there was one."""
        sizes = {
            part: len(self.write(part))
            for part in self._written_out_in(value)
            if part in self.part.names and part.name not in CONDITIONS
        }
        if max(sizes.values(), default=0) < 24:
            return False
        return self._give_line(max(sizes, key=lambda part: sizes[part]))

    def _give_line(self, value: Symbol) -> bool:
        """Let a named value have a line, unless its letter is taken; whether it has one now."""
        name = self.part.names[value]
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
        if name in self.part.predicted:
            return self.notation.letter(barred(letter) if name in self.part.corrected else letter, "t")
        if name == "p" or name in self.letters.slots:
            return self.notation.letter(letter, "t-1")
        self.letters.note_use(name)
        return self.notation.letter(letter)

    def _new(self, name: str) -> str:
        letter = self.letters.letter(name)
        bar = self.part.predicts and name in self.part.corrected
        return self.notation.letter(barred(letter) if bar else letter, "t")


def is_derived(value: Any) -> bool:
    """Whether a value is computed, and neither given nor a plain number."""
    return isinstance(value, Symbol) and value.name not in INPUTS


def arguments(value: Any) -> list[Symbol]:
    """What a value is computed from."""
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
    """How many values each value enters."""
    values = reachable(outputs)
    return Counter({value: 0 for value in values}) + Counter(arg for value in values for arg in set(arguments(value)))


def depends_on_time(value: Symbol) -> bool:
    """Whether a value changes from step to step, options apart."""
    found = reachable([value])
    return any(symbol.name in ("element", "scalar", "total") or symbol.args == ("t",) for symbol in found)


def barred(letter: str) -> str:
    """The letter of a predicted value."""
    return f"{letter[:1]}\u0304{letter[1:]}"


def longest(text: str) -> int:
    """The length of the longest line."""
    return max(map(len, text.splitlines()))
