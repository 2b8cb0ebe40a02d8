"""Parameters that are given twice or share memory: each would be moved by the update of the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.placement import local
from lightning_optim.errors import OptionError


def find_overlap(params: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Two of the tensors that share an element; one and the same twice, where its own elements share memory.

    Views of one buffer are fine as long as they are apart, also when they are interleaved, like the columns of a
    matrix. Looks at addresses first, so it costs a sort; only tensors whose ranges meet are compared element by
    element. Tensors without memory (empty, on the meta device, between two uses under FSDP1) cannot overlap.

    Example:
        >>> buffer = torch.zeros(10)
        >>> find_overlap([buffer[:5], buffer[5:]]) is None
        True
        >>> find_overlap([buffer[:6], buffer[5:]]) is None
        False
    """
    ranges = []
    for p in params:
        part = _with_memory(p)
        if part is None:
            continue
        if any(stride == 0 and size > 1 for size, stride in zip(part.shape, part.stride(), strict=True)):
            return p, p  # an expanded tensor
        low = part.data_ptr()
        high = low + _extent(part) * part.element_size()
        ranges.append((str(part.device), low, high, p, part))
    ranges.sort(key=lambda found: found[:3])
    for meeting in _meeting(ranges):
        if _shared(meeting):
            return next((a[3], b[3]) for a, b in itertools.combinations(meeting, 2) if _shared([a, b]))
    return None


def tensors_of(params: Any) -> list[Tensor]:
    """The tensors of a group's `params`: one, some, or some with names. Torch refuses what is no tensor."""
    items = [params] if isinstance(params, Tensor) else params
    found = [item[1] if isinstance(item, tuple) else item for item in items]
    return [item for item in found if isinstance(item, Tensor)]


def refuse_repeats(owner: str, tensors: list[Tensor], groups: list[dict[str, Any]]) -> None:
    """Refuse a parameter that is given twice, in the new group or in an old one.

    Raises:
        OptionError: where one is.
    """
    seen: dict[int, str] = {}
    for i, group in enumerate(groups):
        seen.update({id(p): f"group {i}" for p in group["params"]})
    for position, p in enumerate(tensors):
        if id(p) in seen:
            raise OptionError(
                f"{owner} got the same parameter twice: number {position} of the new group (shape "
                f"{tuple(p.shape)}) is in {seen[id(p)]} already. Give each parameter once; a tied weight counts once."
            )
        seen[id(p)] = "the same group"


def refuse_overlap(owner: str, tensors: list[Tensor]) -> None:
    """Refuse parameters that share memory.

    Raises:
        OptionError: where two share an element.
    """
    if found := find_overlap(tensors):
        one, other = (tuple(p.shape) for p in found)
        which = f"two parameters of shapes {one} and {other}"
        if found[0] is found[1]:
            which = f"a parameter of shape {one} is expanded: its elements"
        raise OptionError(
            f"{owner}: {which} share memory, and each update would move the other's values too. Make copies with "
            "clone(), or tie weights by using one Parameter in both places; it is counted once."
        )


Range = tuple[str, int, int, Tensor, Tensor]


def _meeting(ranges: list[Range]) -> Iterator[list[Range]]:
    """Groups of two or more whose ranges of addresses meet."""
    group: list[Range] = []
    end = 0
    for found in ranges:
        if group and found[0] == group[0][0] and found[1] < end:
            group.append(found)
            end = max(end, found[2])
            continue
        if len(group) > 1:
            yield group
        group, end = [found], found[2]
    if len(group) > 1:
        yield group


def _shared(ranges: list[Range]) -> bool:
    """Whether any element belongs to two of the tensors."""
    begin, end = min(found[1] for found in ranges), max(found[2] for found in ranges)
    unit = math.gcd(*(part.element_size() for *_, part in ranges), *(found[1] - begin for found in ranges))
    taken = torch.zeros((end - begin) // unit, dtype=torch.bool)
    for _, low, _, _, part in ranges:
        width = part.element_size() // unit
        shape, strides = (*part.shape, width), (*(stride * width for stride in part.stride()), 1)
        own = taken.as_strided(shape, strides, (low - begin) // unit)
        if own.any():
            return True
        own.fill_(True)
    return False


def _with_memory(p: Tensor) -> Tensor | None:
    """The part of a tensor that this process holds, where it has memory with an address."""
    part = local(p)
    if not part.numel() or part.device.type == "meta" or part.layout != torch.strided:
        return None
    try:
        there = part.untyped_storage().nbytes() > 0 and part.data_ptr() > 0
    except (RuntimeError, NotImplementedError):  # a tensor that only stands for others, or that is yet to be made
        return None
    return part if there else None


def _extent(tensor: Tensor) -> int:
    """How many elements lie between the first and the last, these two included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
