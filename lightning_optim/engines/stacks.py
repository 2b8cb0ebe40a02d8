"""Local parameters of one shape, whose statistics are stacked, so that many small ones cost as few calls as one."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.engines.launch import to_device
from lightning_optim.engines.signature import Numbers
from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.engines.strides import Strides, reduced_shape, strides_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(eq=False)
class Stack:
    """Local parameters of one shape, whose statistics are stacked.

    Attributes:
        params: The local parameters.
        positions: The index of each of them in the batch.
        strides: The way through their statistics.
        starts: For each kind of statistic, where the numbers of the first local parameter begin (`Stacks.sizes`).
    """

    params: list[LocalParameter] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    strides: Strides = field(init=False)
    starts: list[int] = field(init=False)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in which the update computes."""
        return self.params[0].compute_dtype

    def shape(self, axes: frozenset[Any]) -> list[int]:
        """The shape of the stacked statistics with some reduced axes."""
        return [len(self.params), *reduced_shape(self.params[0].param.shape, axes)]

    def logical_size(self, axes: frozenset[Any]) -> int:
        """The number of elements of the whole tensor along some axes."""
        param = self.params[0]
        shape = param.param.shape if param.shard is None else param.shard.shape
        return math.prod(shape[axis] for axis in axes)

    def process_groups(self, axes: frozenset[Any]) -> tuple[ProcessGroup, ...]:
        """The process groups over which some axes are split."""
        shard = self.params[0].shard
        return () if shard is None else shard.process_groups_along(axes)

    @functools.cached_property
    def positions_on_device(self) -> Tensor:
        """`positions` as a tensor on the device, (params,) int64."""
        return to_device(torch.tensor(self.positions, dtype=torch.int64, device="cpu"), self.params[0].param.device)


class Stacks:
    """The stacks of a batch, and where their statistics lie for the passes.

    The numbers of one kind of statistic lie in one flat tensor for each compute dtype, stack by stack.

    Args:
        batch: The batch. Ranks find the same stacks in the same order, whatever they hold of each tensor.

    Attributes:
        axes: The reduced axes of each kind of statistic that passes read or add up.
        sizes: The number of values of each kind, by compute dtype.
    """

    def __init__(self, batch: Batch) -> None:
        self.axes = batch.program.axes
        found: dict[Any, Stack] = {}
        for position, param in enumerate(batch.params):
            shape = param.param.shape if param.shard is None else param.shard.shape
            splits = () if param.shard is None else param.shard.splits
            stack = found.setdefault((shape, splits, param.compute_dtype, param.order), Stack())
            stack.params.append(param)
            stack.positions.append(position)
        self.stacks = list(found.values())
        self.sizes: dict[torch.dtype, list[int]] = {}
        for stack in self.stacks:
            sizes = self.sizes.setdefault(stack.dtype, [0] * len(self.axes))
            stack.strides = strides_of(stack.params[0].param.shape, stack.params[0].order, self.axes)
            stack.starts = list(sizes)
            for which, axes in enumerate(self.axes):
                sizes[which] += math.prod(stack.shape(axes))

    @classmethod
    def of(cls, batch: Batch) -> Stacks:
        """The stacks of a batch, which its cache keeps."""
        key = ("stacks", *batch.program.axes)
        if key not in batch.cache:
            batch.cache[key] = cls(batch)
        return batch.cache[key]  # type: ignore[no-any-return]

    @functools.cached_property
    def of_position(self) -> dict[int, tuple[Stack, tuple[int, ...]]]:
        """For each position in the batch its stack, and where the numbers of each kind of statistic begin."""
        found = {}
        for stack in self.stacks:
            steps = [math.prod(stack.shape(axes)[1:]) for axes in self.axes]
            for member, position in enumerate(stack.positions):
                starts = tuple(start + member * step for start, step in zip(stack.starts, steps, strict=True))
                found[position] = stack, starts
        return found

    @functools.cached_property
    def numbers(self) -> list[Numbers]:
        """The layout of each local parameter in numbers; empty where passes need no statistics."""
        found = []
        for position in range(len(self.of_position) if self.axes else 0):
            stack, starts = self.of_position[position]
            of_each = zip(starts, stack.strides.strides, strict=True)
            numbers = (*stack.strides.sizes, *(number for start, strides in of_each for number in (start, *strides)))
            found.append(Numbers(numbers, len(stack.strides.sizes), len(self.axes)))
        return found

    def zeros(self, which: int) -> dict[torch.dtype, Tensor]:
        """Sums of one kind of statistic to add up to, float64, by compute dtype."""
        device = self.stacks[0].params[0].param.device
        return {
            dtype: torch.zeros(sizes[which], dtype=torch.float64, device=device) for dtype, sizes in self.sizes.items()
        }

    def split(self, which: int, flat: dict[torch.dtype, Tensor]) -> list[Tensor]:
        """The stacked statistics of each stack in the flat tensors that hold one kind of statistic."""
        found = []
        for stack in self.stacks:
            shape, start = stack.shape(self.axes[which]), stack.starts[which]
            found.append(flat[stack.dtype][start : start + math.prod(shape)].view(shape))
        return found
