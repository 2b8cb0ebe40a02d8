"""What a step looks at of a list of tensors, compared with the step before: their kinds, and where they are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:  # what the guards of torch.compile look at, all tensors in one call. It is not public: below is the same without
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment,misc]

FACTS: tuple[Any, ...] = (
    *(type, operator.attrgetter("dtype"), Tensor.numel, Tensor.is_contiguous),  # `map` calls no function of Python
    *(Tensor.is_neg, Tensor._is_zerotensor),
)


class Kinds:
    """The classes, dtypes, sizes and strides of some tensors, and whether their memory holds their values.

    Args:
        tensors: The tensors. None of them is kept.

    Example:
        >>> import torch
        >>> matrices = [torch.ones(2, 2), torch.ones(3, 2)]
        >>> kinds = Kinds(matrices)
        >>> kinds.are_of([torch.zeros(2, 2), torch.zeros(3, 2)]), kinds.are_of([torch.ones(2, 2), torch.ones(2, 3).t()])
        (True, False)
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.facts = _facts(tensors)
        made = (
            None if TensorGuards is None else TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        )
        self.guards: Any = made

    def are_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether as many other tensors are of these kinds, one by one.

        Raises:
            RuntimeError: of torch, for sparse tensors.
        """
        if len(tensors) != len(self.facts[0]):
            return False
        if self.guards is not None and self.guards.check(*tensors):
            return True
        same = self.facts == _facts(tensors)
        if same:  # guards see more: one tensor that is there twice, or autocast
            self.guards = None
        return same


def _facts(tensors: Sequence[Tensor]) -> list[Any]:
    """What guards look at, in lists of plain values: many small objects would wake the garbage collector."""
    found = [list(map(fact, tensors)) for fact in FACTS]
    contiguous = found[FACTS.index(Tensor.is_contiguous)]
    return [*found, [x.stride() for x, plain in zip(tensors, contiguous, strict=True) if not plain]]


class Gradients:
    """What launches depend on of the gradients of a step, besides their values.

    Attributes:
        addresses: The address of each gradient.
        kinds: The kinds of all gradients of the step. Launches stay valid while they do.
    """

    def __init__(self, addresses: list[int], kinds: Kinds) -> None:
        self.addresses, self.kinds = addresses, kinds

    @classmethod
    def of(cls, grads: Sequence[Tensor], before: Gradients | None = None) -> Gradients:
        """Look at the gradients of a step.

        Args:
            grads: The gradients.
            before: What the step before has found. The same object is returned where nothing is different, and one
                with the same `kinds` where gradients have only moved.

        Raises:
            RuntimeError: of torch, for a tensor without an address.
        """
        addresses = list(map(Tensor.data_ptr, grads))
        if before is None or not before.kinds.are_of(grads):
            return cls(addresses, Kinds(grads))
        return before if before.addresses == addresses else cls(addresses, before.kinds)

    @functools.cached_property
    def aligned(self) -> list[bool]:
        """Whether each address is a multiple of 16."""
        return [address % 16 == 0 for address in self.addresses]
