"""Where the elements of a tensor find their number in its statistics.

A pass walks over a tensor in the order of its memory, and a statistic (a row or column mean, ...) lies in memory of its
own. Neighbouring axes that all statistics treat alike count as one, so a matrix has two axes and few tensors have more
than three. An element with the index (i, j, ...) along them reads `statistic[i * strides[0] + j * strides[1] + ...]`.
A sum towards the statistic is the reverse: the element is added there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST = 3  # axes, so that one kernel serves matrices and most others
Rectangle = tuple[tuple[int, int], ...]  # the first index and the end along each axis


@dataclass(frozen=True)
class Strides:
    """The axes of a tensor in the order of memory, and the way through its statistics along them.

    Attributes:
        sizes: The size of each axis.
        strides: For each kind of statistic, the distance between its numbers along each axis: 0 along reduced axes.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def spread(self, which: int, statistic: Tensor, out: Tensor, low: int) -> Tensor:
        """Write the numbers of a statistic for `out.numel()` elements from element `low` on.

        Args:
            which: The kind of the statistic.
            statistic: Its numbers, in flat contiguous memory.
            out: A flat tensor that is written.
            low: The first element in the order of memory.
        """
        strides, done = self.strides[which], 0
        for rectangle in rectangles(self.sizes, low, low + out.numel()):
            shape = [end - first for first, end in rectangle]
            count = math.prod(shape)
            out[done : done + count].view(shape).copy_(_part(statistic, rectangle, shape, strides))
            done += count
        return out

    def add_up(self, which: int, total: Tensor, x: Tensor, low: int) -> None:
        """Add elements to the sums of a statistic; the reverse of `spread`.

        Args:
            which: The kind of the statistic.
            total: Its sums, in flat contiguous float64 memory.
            x: Elements, flat.
            low: The index of the first of them in the order of memory.
        """
        strides, done = self.strides[which], 0
        for rectangle in rectangles(self.sizes, low, low + x.numel()):
            shape = [end - first for first, end in rectangle]
            part = x[done : done + math.prod(shape)].view(shape)
            reduced = [axis for axis, stride in enumerate(strides) if stride == 0]
            kept = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
            target = _part(total, rectangle, kept, strides)
            target += part.sum(reduced, keepdim=True, dtype=torch.float64) if reduced else part
            done += part.numel()

    def window(self, which: int, low: int, high: int) -> tuple[int, int]:
        """The first number of a statistic that elements `low` to `high` belong to, and the end."""
        corners = [
            (self._offset(which, [first for first, _ in found]), self._offset(which, [end - 1 for _, end in found]))
            for found in rectangles(self.sizes, low, high)
        ]
        return min((first for first, _ in corners), default=0), max((last for _, last in corners), default=-1) + 1

    def _offset(self, which: int, index: Sequence[int]) -> int:
        return sum(i * stride for i, stride in zip(index, self.strides[which], strict=True))

    def with_members(self, count: int) -> Strides:
        """The layout of several such tensors one after another."""
        numbers = [
            math.prod(size for size, stride in zip(self.sizes, own, strict=True) if stride) for own in self.strides
        ]
        return Strides(
            (count, *self.sizes), tuple((number, *own) for number, own in zip(numbers, self.strides, strict=True))
        )


def strides_of(shape: Sequence[int], order: Sequence[int] | None, axes: Sequence[frozenset[Any]]) -> Strides:
    """The layout of a tensor.

    Args:
        shape: Its shape.
        order: Its axes from the outermost to the innermost in memory; None where they lie in their own order.
        axes: The reduced axes of each kind of statistic.

    Example:
        >>> strides_of((64, 32, 3, 3), None, [frozenset({1, 2, 3}), frozenset({0})])
        Strides(sizes=(1, 64, 288), strides=((0, 1, 0), (0, 0, 1)))
    """
    order = range(len(shape)) if order is None else order
    of_each = [_strides(shape, {axis % len(shape) for axis in reduced}) for reduced in axes]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in axes]
    for axis in order:
        size = shape[axis]
        if size == 1:
            continue
        if sizes and all(own[-1] == found[axis] * size for own, found in zip(strides, of_each, strict=True)):
            sizes[-1] *= size
            for own, found in zip(strides, of_each, strict=True):
                own[-1] = found[axis]
            continue
        sizes.append(size)
        for own, found in zip(strides, of_each, strict=True):
            own.append(found[axis])
    missing = max(LEAST - len(sizes), 0)
    return Strides((1,) * missing + tuple(sizes), tuple((0,) * missing + tuple(own) for own in strides))


def reduced_shape(shape: Sequence[int], axes: frozenset[Any]) -> list[int]:
    """The shape of a statistic."""
    reduced = {axis % len(shape) for axis in axes}
    return [1 if axis in reduced else size for axis, size in enumerate(shape)]


def _strides(shape: Sequence[int], reduced: set[int]) -> list[int]:
    """The strides of a contiguous statistic along the axes of its tensor, 0 where it has size 1."""
    sizes = reduced_shape(shape, frozenset(reduced))
    return [0 if axis in reduced else math.prod(sizes[axis + 1 :]) for axis in range(len(shape))]


def rectangles(sizes: Sequence[int], low: int, high: int) -> Iterator[Rectangle]:
    """Cut elements `low` to `high` of a contiguous tensor into rectangular blocks, in order.

    Example:
        >>> list(rectangles((3, 4), 2, 9))
        [((0, 1), (2, 4)), ((1, 2), (0, 4)), ((2, 3), (0, 1))]
    """
    if low >= high:
        return
    if len(sizes) == 1:
        yield ((low, high),)
        return
    inner = math.prod(sizes[1:])
    (first, begin), (last, end) = divmod(low, inner), divmod(high, inner)
    if first == last:
        yield from (((first, first + 1), *found) for found in rectangles(sizes[1:], begin, end))
        return
    if begin:
        yield from (((first, first + 1), *found) for found in rectangles(sizes[1:], begin, inner))
        first += 1
    if first < last:
        yield ((first, last), *((0, size) for size in sizes[1:]))
    yield from (((last, last + 1), *found) for found in rectangles(sizes[1:], 0, end))


def _part(statistic: Tensor, rectangle: Rectangle, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The numbers of a statistic that belong to a rectangle, as a view of some shape."""
    offset = sum(first * stride for (first, _), stride in zip(rectangle, strides, strict=True))
    return statistic.as_strided(shape, strides, statistic.storage_offset() + offset)
