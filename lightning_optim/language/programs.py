"""The programs of one update, by what selects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_optim.language.program import Program, Update, look_up, trace
from lightning_optim.language.slot import Slot


class Programs:
    """The programs of one update, by flags and guards."""

    def __init__(self, update: Update, slots: Mapping[str, Slot] | None = None) -> None:
        self.update, self.slots = update, slots
        self.guarded: set[str] = set()
        self.programs: dict[tuple[Any, ...], Program] = {}

    def __call__(self, h: Mapping[str, Any]) -> Program:
        """The program for these options, traits and scalars, traced at its first use."""
        key = self._key(h)
        if key not in self.programs:
            program = trace(self.update, h, self.slots)
            self.guarded |= set(program.guards)
            key = self._key(h)  # with the new guards
            self.programs[key] = program
        return self.programs[key]

    def _key(self, h: Mapping[str, Any]) -> tuple[Any, ...]:
        flags = tuple(_flag(value) for value in h.values())
        return (*h, *flags, *(_is_nonzero(h, name) for name in sorted(self.guarded)))


def flags_of(h: Mapping[str, Any]) -> list[Any] | None:
    """What may select another program, in a list that is quickly made and compared; None where that takes more.

    Floats select none, but for whether they are zero. Other programs may have equal lists.
    """
    found: list[Any] = list(h)
    for value in h.values():
        if type(value) is float:
            found.append(value != 0.0)
        elif isinstance(value, (dict, Tensor)):
            return None
        else:
            found.append(value)
    return found


def _is_nonzero(h: Mapping[str, Any], name: str) -> bool | None:
    """The answer to a guard; None where another program asked for it and `h` has no such number."""
    try:
        return bool(look_up(h, name))
    except (KeyError, IndexError, TypeError):  # the options of a stage that does not act, None instead of a tuple
        return None


def _flag(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_flag(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _flag(item)) for key, item in value.items())
    return "float" if isinstance(value, float) else "tensor" if isinstance(value, Tensor) else value
