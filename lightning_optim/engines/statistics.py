"""Statistics of a batch: one number per row, per column, ... of each tensor, computed in torch between passes.

Tensors of one shape are stacked, so that many small ones cost as few calls as one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.engines.launch import Numbers, to_device
from lightning_optim.engines.layout import Layout, layout_of, reduced_shape
from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.language.axes import as_axes
from lightning_optim.language.math import apply
from lightning_optim.language.symbols import Symbol, is_statistic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(eq=False)
class Group:
    """Local parameters of one shape, whose statistics are stacked.

    Attributes:
        params: The local parameters.
        positions: The index of each of them in the batch.
        layout: The way through their statistics.
        starts: For each kind of statistic, where the numbers of the first local parameter begin (`Groups.sizes`).
    """

    params: list[LocalParameter] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    layout: Layout = field(init=False)
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


class Groups:
    """The groups of a batch, and where their statistics lie for the passes.

    The numbers of one kind of statistic lie in one flat tensor for each compute dtype, group by group.

    Args:
        batch: The batch. Ranks find the same groups in the same order, whatever they hold of each tensor.

    Attributes:
        axes: The reduced axes of each kind of statistic that passes read or add up.
        sizes: The number of values of each kind, by compute dtype.
    """

    def __init__(self, batch: Batch) -> None:
        self.axes = batch.program.axes
        found: dict[Any, Group] = {}
        for position, param in enumerate(batch.params):
            shape = param.param.shape if param.shard is None else param.shard.shape
            splits = () if param.shard is None else param.shard.splits
            group = found.setdefault((shape, splits, param.compute_dtype, param.order), Group())
            group.params.append(param)
            group.positions.append(position)
        self.groups = list(found.values())
        self.sizes: dict[torch.dtype, list[int]] = {}
        for group in self.groups:
            sizes = self.sizes.setdefault(group.dtype, [0] * len(self.axes))
            group.layout = layout_of(group.params[0].param.shape, group.params[0].order, self.axes)
            group.starts = list(sizes)
            for which, axes in enumerate(self.axes):
                sizes[which] += math.prod(group.shape(axes))

    @classmethod
    def of(cls, batch: Batch) -> Groups:
        """The groups of a batch, which its cache keeps."""
        key = ("groups", *batch.program.axes)
        if key not in batch.cache:
            batch.cache[key] = cls(batch)
        return batch.cache[key]  # type: ignore[no-any-return]

    @functools.cached_property
    def place(self) -> dict[int, tuple[Group, tuple[int, ...]]]:
        """For each position in the batch its group, and where the numbers of each kind of statistic begin."""
        found = {}
        for group in self.groups:
            steps = [math.prod(group.shape(axes)[1:]) for axes in self.axes]
            for member, position in enumerate(group.positions):
                starts = tuple(start + member * step for start, step in zip(group.starts, steps, strict=True))
                found[position] = group, starts
        return found

    @functools.cached_property
    def numbers(self) -> list[Numbers]:
        """The layout of each local parameter in numbers; empty where passes need no statistics."""
        found = []
        for position in range(len(self.place) if self.axes else 0):
            group, starts = self.place[position]
            of_each = zip(starts, group.layout.strides, strict=True)
            numbers = (*group.layout.sizes, *(number for start, strides in of_each for number in (start, *strides)))
            found.append(Numbers(numbers, len(group.layout.sizes), len(self.axes)))
        return found

    def zeros(self, which: int) -> dict[torch.dtype, Tensor]:
        """Sums of one kind of statistic to add up to, float64, by compute dtype."""
        device = self.groups[0].params[0].param.device
        return {
            dtype: torch.zeros(sizes[which], dtype=torch.float64, device=device) for dtype, sizes in self.sizes.items()
        }

    def split(self, which: int, flat: dict[torch.dtype, Tensor]) -> list[Tensor]:
        """The stacked statistics of each group in the flat tensors that hold one kind of statistic."""
        found = []
        for group in self.groups:
            shape, start = group.shape(self.axes[which]), group.starts[which]
            found.append(flat[group.dtype][start : start + math.prod(shape)].view(shape))
        return found


@dataclass
class Mean:
    """A mean of one group before it is divided.

    Attributes:
        symbol: Its symbol.
        group: The group.
        total: The sums over local elements, float64.
    """

    symbol: Symbol
    group: Group
    total: Tensor

    @property
    def axes(self) -> frozenset[Any]:
        """The axes along which it is taken."""
        return as_axes(self.symbol.args[1])

    @property
    def process_groups(self) -> tuple[ProcessGroup, ...]:
        """The process groups that hold the other summands."""
        return self.group.process_groups(self.axes)

    def divided(self, total: Tensor) -> Tensor:
        """The mean in the compute dtype, from the sums over all elements."""
        return (total / self.group.logical_size(self.axes)).to(self.group.dtype)


class Statistics:
    """The statistics of a batch in one step.

    Args:
        batch: The batch.
        number: A function that returns the value of a symbol that is no statistic, or the argument itself where it is
            no symbol.

    Attributes:
        values: For each symbol that has been computed, the stacked values of each group.
    """

    def __init__(self, batch: Batch, number: Callable[[Any], Any]) -> None:
        self.batch, self.number = batch, number
        self.values: dict[Symbol, list[Tensor]] = {}
        self._flat: dict[tuple[Symbol, torch.dtype], Tensor] = {}

    @functools.cached_property
    def groups(self) -> Groups:
        """The groups of the batch."""
        return Groups.of(self.batch)

    def evaluate(self, symbol: Symbol) -> None:
        """Compute a statistic that is no mean and whose arguments have values."""
        if symbol.name == "statistic":
            slot = symbol.args[0]
            stacked = (torch.stack([param.state[slot] for param in group.params]) for group in self.groups.groups)
            self.values[symbol] = [x.to(group.dtype) for x, group in zip(stacked, self.groups.groups, strict=True)]
            return
        of_groups = enumerate(self.groups.groups)
        self.values[symbol] = [
            _called(symbol.name, [self._argument(arg, i, group) for arg in symbol.args]) for i, group in of_groups
        ]

    def _argument(self, arg: Any, i: int, group: Group) -> Any:
        if is_statistic(arg):
            return self.values[arg][i]
        number = self.number(arg)
        if not isinstance(number, Tensor):
            return number
        if number.dtype != torch.bool:
            number = number.to(group.dtype)
        if number.dim():
            number = number if len(group.positions) == len(number) else number[group.positions_on_device]
            number = number.view(-1, *[1] * group.params[0].param.dim())
        return number

    def means(self, symbol: Symbol, sums: list[Tensor] | None) -> list[Mean]:
        """A mean of each group before it is divided.

        Args:
            symbol: The mean.
            sums: The sums over the local elements of each group, where the argument has one value per element.
        """
        found = []
        for i, group in enumerate(self.groups.groups):
            if sums is None:
                dims = group.params[0].param.dim()
                along = [axis % dims + 1 for axis in as_axes(symbol.args[1])]
                total = self.values[symbol.args[0]][i].sum(along, keepdim=True, dtype=torch.float64)
            else:
                total = sums[i]
            found.append(Mean(symbol, group, total))
        return found

    def flat(self, symbol: Symbol, dtype: torch.dtype) -> Tensor:
        """The values of a statistic for all groups of a compute dtype, as passes read them."""
        if (symbol, dtype) not in self._flat:
            of_dtype = [
                x.to(dtype).reshape(-1)
                for x, group in zip(self.values[symbol], self.groups.groups, strict=True)
                if group.dtype == dtype
            ]
            self._flat[symbol, dtype] = torch.cat(of_dtype) if len(of_dtype) > 1 else of_dtype[0].contiguous()
        return self._flat[symbol, dtype]

    def write(self, slot: str, symbol: Symbol) -> None:
        """Write the new values of a slot, or of the parameter."""
        for values, group in zip(self.values[symbol], self.groups.groups, strict=True):
            held = [i for i, param in enumerate(group.params) if param.numel]  # the mean of no elements is no number
            if not held:
                continue
            targets = [group.params[i].param if slot == "p" else group.params[i].state[slot] for i in held]
            new = values.unbind()
            torch._foreach_copy_(targets, [new[i].expand_as(x) for i, x in zip(held, targets, strict=True)])


def _called(name: str, args: Sequence[Any]) -> Any:
    """A function of statistics, as torch computes it when the update is called on tensors."""
    if name == "where" and not isinstance(args[0], Tensor):
        return args[1] if args[0] else args[2]
    if name == "div" and not isinstance(args[0], Tensor):
        return args[1].reciprocal() * args[0]  # as torch divides a number by a tensor
    return apply(name, *args)
