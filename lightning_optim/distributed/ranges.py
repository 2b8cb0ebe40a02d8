"""Moves flat ranges of tensors between the ranks of a process group: who holds which elements, and who wants which.

All tensors of a dtype travel in one message. Sizes follow from the ranges, which all ranks know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Ranges = tuple[tuple[int, int], ...]  # from the first element to the end, in ascending order


@dataclass(frozen=True, eq=False)
class Move:
    """A tensor whose elements move.

    Attributes:
        values: What this rank holds: a flat tensor, range behind range.
        held: The ranges of the whole flat tensor that each rank holds. No element is held twice.
        wanted: The ranges that each rank gets.
    """

    values: Tensor
    held: Sequence[Ranges]
    wanted: Sequence[Ranges]


def size(ranges: Ranges) -> int:
    """The number of elements.

    Example:
        >>> size(((0, 2), (6, 9)))
        5
    """
    return sum(high - low for low, high in ranges)


def shared(a: Ranges, b: Ranges) -> Ranges:
    """The elements that are in both.

    Example:
        >>> shared(((0, 4), (6, 9)), ((2, 7),))
        ((2, 4), (6, 7))
    """
    found = ((max(low, other_low), min(high, other_high)) for low, high in a for other_low, other_high in b)
    return tuple((low, high) for low, high in found if low < high)


def within(ranges: Ranges, low: int, high: int) -> slice:
    """Where a range that lies in one of these stands in a flat tensor of all of them."""
    begin = sum(min(end, low) - start for start, end in ranges if start < low)
    return slice(begin, begin + high - low)


def move(moves: Sequence[Move], group: ProcessGroup) -> list[Tensor]:
    """What this rank wants of each tensor, flat, range behind range. All ranks of the group must call it.

    Args:
        moves: The tensors, in an order that is the same on all ranks.
        group: The process group.
    """
    own, ranks = dist.get_rank(group), range(dist.get_world_size(group))
    found = [one.values.new_empty(size(one.wanted[own])) for one in moves]
    for dtype in dict.fromkeys(one.values.dtype for one in moves):
        of_dtype = [(one, result) for one, result in zip(moves, found, strict=True) if one.values.dtype == dtype]
        sent = [
            [one.values[within(one.held[own], *part)] for one, _ in of_dtype for part in _between(one, own, rank)]
            for rank in ranks
        ]
        places = [
            [result[within(one.wanted[own], *part)] for one, result in of_dtype for part in _between(one, rank, own)]
            for rank in ranks
        ]
        flat = [x for of_rank in sent for x in of_rank]
        packed = torch.cat(flat) if flat else of_dtype[0][0].values.new_empty(0)
        sizes = [sum(x.numel() for x in of_rank) for of_rank in places]
        received = packed.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, packed, sizes, [sum(x.numel() for x in of_rank) for of_rank in sent], group=group
        )
        parts = [place for of_rank in places for place in of_rank]
        for place, values in zip(parts, torch.split(received, [x.numel() for x in parts]), strict=True):
            place.copy_(values)
    return found


def _between(one: Move, source: int, target: int) -> Ranges:
    return shared(one.held[source], one.wanted[target])
