"""An attempt at a step: what it has counted and created is taken back where it fails before a weight has moved.

A step may fail in many places: a kernel cannot be compiled, memory runs out, somebody presses Ctrl-C. The next step
then goes on as if the failed one had not been called. Where a part of the parameters has been written by then, these
have been counted and the others have not.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any


class Attempt:
    """Restores what counts steps besides the state of parameters, if a step fails before anything was written.

    Args:
        has_moved: A function that says whether anything was written.
        counting: Stages, and the loss that a step uses up. They change by assignment to their attributes.
    """

    def __init__(self, has_moved: Callable[[], bool], *counting: Any) -> None:
        self.has_moved = has_moved
        self.before = [(vars(one), dict(vars(one))) for one in counting]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None) -> None:
        if kind is not None and not self.has_moved():
            for now, before in self.before:
                now.clear()
                now.update(before)


class Created:
    """What is created in some mappings, so that it can be removed again."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[MutableMapping[Any, Any], set[Any]]] = {}

    def note(self, state: MutableMapping[Any, Any]) -> None:
        """Remember which names a mapping has now, unless that is known already."""
        if id(state) not in self.before:
            self.before[id(state)] = state, set(state)

    def remove(self) -> None:
        """Remove all names that came after."""
        for state, names in self.before.values():
            for name in state.keys() - names:
                del state[name]
