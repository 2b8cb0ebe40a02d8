"""Watches everything to which batches refer: whether a parameter or a slot was replaced, moved or turned."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.distributed.placement import is_dtensor, local
from lightning_optim.engines.facts import Facts
from lightning_optim.engines.native import native
from lightning_optim.storage import Quantized


class Watch:
    """What the state of an optimizer holds for some parameters, and where it is.

    Args:
        state: The state.
        params: The parameters.
        known: The names of all slots, where other programs keep something beside them; None where nobody does.
    """

    def __init__(
        self, state: Mapping[Tensor, dict[str, Any]], params: Sequence[Tensor], known: Collection[str] | None = None
    ) -> None:
        self.state, self.known = state, known
        self.of_params = [state[p] for p in params]
        self.keys, self.states = list(state), list(state.values())
        self.everything = self._everything()
        self.values = list(self._values())
        self.tensors: list[Tensor] = [*params]
        for value in self.values:
            self.tensors += (value.codes, value.scales) if isinstance(value, Quantized) else (value,)
        self.has_dtensors = any(map(is_dtensor, self.tensors))
        self.facts = Facts.of(self._local(), slots=len(self.tensors) - len(params))

    def sees_nothing(self) -> bool:
        """Whether everything is as it was."""
        return self._is_held() and Facts.of(self._local(), self.facts) is self.facts

    def _is_held(self) -> bool:
        """Whether the state holds the same objects."""
        library = native()
        if library is not None and library.holds(self.state, self.keys, self.states, self.everything):
            return True
        of_same = is_same(self.state, self.keys) and is_same(self.state.values(), self.states)
        if not (of_same and is_same(list(self._values()), self.values)):
            return False
        self.everything = self._everything() if library is not None else []  # another program has changed its part
        return True

    def _everything(self) -> list[Any]:
        """All that the state holds, what other programs keep there included."""
        return [value for of in self.states for value in of.values()]

    def _local(self) -> list[Tensor]:
        return list(map(local, self.tensors)) if self.has_dtensors else self.tensors

    def _values(self) -> Iterable[Any]:
        """Step counters and slots of all parameters, without what other programs keep in the state."""
        return itertools.chain.from_iterable(
            map(dict.values if self.known is None else self._values_of, self.of_params)
        )

    def _values_of(self, state: Mapping[str, Any]) -> Iterable[Any]:
        return [value for name, value in state.items() if name in (self.known or ())]


def is_same(found: Collection[Any], kept: Collection[Any]) -> bool:
    """Whether two collections hold the same objects."""
    return found is kept or (len(found) == len(kept) and all(map(operator.is_, found, kept)))
