"""What a step looks at of a list of tensors, compared with the step before: their kinds, and where they are."""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.plain import is_wrapper
from lightning_optim.engines.native import MOVED, SAME, Numbers, native, numbers

try:  # what the guards of torch.compile look at, all tensors in one call. It is not public: below is the same without
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment,misc]

LOOKS: tuple[Any, ...] = (  # `map` calls no function of Python
    *(type, operator.attrgetter("dtype"), operator.attrgetter("shape"), Tensor.is_neg, Tensor._is_zerotensor),
)


class Kinds:
    """The classes, dtypes, sizes and strides of some tensors, and whether their memory holds their values.

    Args:
        tensors: The tensors. None of them is kept.
        slots: The number of those at the end that are slots, of which only strides may change while they stay where
            they are.

    Attributes:
        count: The number of tensors.
        described: Their kinds as `native.cpp` describes them; None as long as that is not there.

    Example:
        >>> import torch
        >>> matrices = [torch.ones(2, 2), torch.ones(3, 2)]
        >>> kinds = Kinds(matrices)
        >>> kinds.are_of([torch.zeros(2, 2), torch.zeros(3, 2)]), kinds.are_of([torch.ones(2, 2), torch.ones(2, 3).t()])
        (True, False)
    """

    def __init__(self, tensors: Sequence[Tensor], slots: int = 0) -> None:
        self.count, self.slots = len(tensors), slots
        closely, slots_of = self._parts(tensors)
        self.found, self.strides = _looks(closely), _strides(slots_of)
        dynamic: dict[str, Any] = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
        guards = None if any(map(is_wrapper, closely)) else TensorGuards  # one that has no strides ends the process
        self.guards: Any = None if guards is None else guards(*closely, **dynamic)
        self.described: Numbers | None = None

    def are_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether as many other tensors are of these kinds, one by one.

        Raises:
            RuntimeError: of torch, for sparse tensors.
        """
        if len(tensors) != self.count:
            return False
        closely, slots = self._parts(tensors)
        if slots and _strides(slots) != self.strides:
            return False
        if self.guards is not None and self.guards.check(*closely):
            return True
        same = self.found == _looks(closely)
        if same:  # guards see more: one tensor that is there twice, or autocast
            self.guards = None
        return same

    def _parts(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The tensors but for the slots, and these."""
        at = self.count - self.slots
        return (tensors[:at], tensors[at:]) if self.slots else (tensors, ())


def _looks(tensors: Sequence[Tensor]) -> list[Any]:
    """What guards look at, in lists of plain values: many small objects would wake the garbage collector."""
    return [*(list(map(look, tensors)) for look in LOOKS), *_strides(tensors)]


def _strides(tensors: Sequence[Tensor]) -> list[Any]:
    """Which tensors are contiguous, and the strides of the others."""
    contiguous = list(map(Tensor.is_contiguous, tensors))
    plain = all(contiguous)
    return [contiguous, [] if plain else [x.stride() for x in tensors if not x.is_contiguous()]]


class Facts:
    """What a step depends on of a list of tensors, besides their values.

    Args:
        addresses: The address of each tensor, in any of the three forms below.
        kinds: The kinds of all of them. Launches stay valid while they do.
    """

    def __init__(self, addresses: list[int] | Numbers | Tensor, kinds: Kinds) -> None:
        self.given, self.kinds = addresses, kinds

    @functools.cached_property
    def listed(self) -> list[int]:
        """The address of each tensor."""
        given = self.given
        return given if isinstance(given, list) else given.tolist() if isinstance(given, Tensor) else given[:]

    @functools.cached_property
    def numbers(self) -> Numbers:
        """The address of each tensor, as C++ reads them."""
        return self.given if isinstance(self.given, ctypes.Array) else numbers(len(self.listed), self.listed)

    @functools.cached_property
    def addresses(self) -> Tensor:
        """The address of each tensor, (tensors,) int64 on the CPU."""
        return self.given if isinstance(self.given, Tensor) else torch.frombuffer(self.numbers, dtype=torch.int64)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], before: Facts | None = None, slots: int = 0) -> Facts:
        """Look at tensors.

        Args:
            tensors: The tensors.
            before: What the step before has found. The same object is returned where nothing is different, and one
                with the same `kinds` where tensors have only moved.
            slots: As in `Kinds`, where there is nothing before.

        Raises:
            RuntimeError: of torch, for a tensor without an address.
        """
        if before is not None and (found := before.followed_by(tensors)):
            return found
        addresses = list(map(Tensor.data_ptr, tensors))
        if before is None or not before.kinds.are_of(tensors):
            return cls(addresses, Kinds(tensors, slots))
        found = before if before.listed == addresses else cls(addresses, before.kinds)
        found._describe(tensors)
        return found

    def _describe(self, tensors: Sequence[Tensor]) -> None:
        """Let one call compare the tensors of later steps with these."""
        library = native()
        if library is not None:
            self.kinds.described = library.describe([*tensors])

    def followed_by(self, tensors: Sequence[Tensor], of_gradients: bool = False) -> Facts | None:
        """The facts of other tensors as `of` finds them, if one call can tell that they are of the same kinds.

        Args:
            tensors: The tensors.
            of_gradients: Look at the gradients of `tensors` instead, without an object of Python for each.

        Returns:
            The facts; None where that cannot be told.
        """
        library, described = native(), self.kinds.described
        if library is None or described is None or len(tensors) != self.kinds.count or type(tensors) is not list:
            return None
        now = numbers(self.kinds.count)
        answer = library.look(tensors, of_gradients, described, self.numbers, now)
        return self if answer == SAME else Facts(now, self.kinds) if answer == MOVED else None

    def at(self, positions: Tensor) -> Facts:
        """Those of some of the tensors, with the kinds of all."""
        return Facts(self.addresses[positions], self.kinds)

    @functools.cached_property
    def aligned(self) -> Tensor:
        """Whether each address is a multiple of 16, (tensors,) bool."""
        return self.addresses % 16 == 0
