"""Parameters that are given twice or share memory. The update of one would change the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.placement import local
from lightning_optim.errors import OptionError


def find_overlap(params: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The first two tensors that share an element, or the same one twice if its own elements share memory.

    Disjoint views of one buffer are fine, also interleaved ones such as the columns of a matrix. Addresses are
    compared first, which costs a sort. Only tensors whose address ranges overlap are compared element by element.
    Tensors without memory (empty, on the meta device, resharded by FSDP1) cannot overlap.

    Returns:
        Two tensors, or None.

    Example:
        >>> buffer = torch.zeros(10)
        >>> find_overlap([buffer[:5], buffer[5:]]) is None
        True
        >>> find_overlap([buffer[:6], buffer[5:]]) is None
        False
    """
    ranges = []
    for p in params:
        tensor = _with_memory(p)
        if tensor is None:
            continue
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            return p, p  # an expanded tensor
        low = tensor.data_ptr()
        high = low + _extent(tensor) * tensor.element_size()
        ranges.append((str(tensor.device), low, high, p, tensor))
    ranges.sort(key=lambda found: found[:3])
    for overlapping in _overlapping(ranges):
        if _share_an_element(overlapping):
            return next((a[3], b[3]) for a, b in itertools.combinations(overlapping, 2) if _share_an_element([a, b]))
    return None


def refuse_repeats(owner: str, tensors: list[Tensor], groups: list[dict[str, Any]]) -> None:
    """Refuse a parameter that is given twice.

    Args:
        owner: The optimizer, for the message.
        tensors: The parameters of a new group.
        groups: The existing parameter groups.

    Raises:
        OptionError: where a parameter occurs twice.
    """
    seen: dict[int, str] = {}  # the words for the group of each parameter, by id
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

    Args:
        owner: The optimizer, for the message.
        tensors: Its parameters.

    Raises:
        OptionError: where two parameters share an element.
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


Range = tuple[str, int, int, Tensor, Tensor]  # device, first and last address, parameter, local tensor


def _overlapping(ranges: list[Range]) -> Iterator[list[Range]]:
    """Sets of two or more tensors whose address ranges overlap, from ranges in ascending order."""
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


def _share_an_element(ranges: list[Range]) -> bool:
    """Whether any element belongs to two of the tensors."""
    begin, end = min(found[1] for found in ranges), max(found[2] for found in ranges)
    unit = math.gcd(*(tensor.element_size() for *_, tensor in ranges), *(found[1] - begin for found in ranges))
    taken = torch.zeros((end - begin) // unit, dtype=torch.bool, device="cpu")
    for _, low, _, _, tensor in ranges:
        width = tensor.element_size() // unit
        shape, strides = (*tensor.shape, width), (*(stride * width for stride in tensor.stride()), 1)
        elements = taken.as_strided(shape, strides, (low - begin) // unit)
        if elements.any():
            return True
        elements.fill_(True)
    return False


def _with_memory(p: Tensor) -> Tensor | None:
    """The local tensor of a parameter, if it has memory with an address."""
    if is_lazy(p):
        return None
    tensor = local(p)
    if not tensor.numel() or tensor.device.type == "meta" or tensor.layout != torch.strided:
        return None
    try:
        has_memory = tensor.untyped_storage().nbytes() > 0 and tensor.data_ptr() > 0
    except (RuntimeError, NotImplementedError):  # a wrapper subclass
        return None
    return tensor if has_memory else None


def _extent(tensor: Tensor) -> int:
    """Number of elements from the first to the last in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
