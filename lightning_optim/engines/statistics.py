"""Statistics of a batch: one number per row, per column, ... of each tensor, computed in torch between passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.engines.stacks import Stack, Stacks
from lightning_optim.engines.step import Batch
from lightning_optim.language.axes import as_axes
from lightning_optim.language.math import apply
from lightning_optim.language.symbols import Symbol, is_statistic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Mean:
    """A mean of one stack before it is divided.

    Attributes:
        symbol: Its symbol.
        stack: The stack.
        total: The sums over local elements, float64.
    """

    symbol: Symbol
    stack: Stack
    total: Tensor

    @property
    def axes(self) -> frozenset[Any]:
        """The axes along which it is taken."""
        return as_axes(self.symbol.args[1])

    @property
    def process_groups(self) -> tuple[ProcessGroup, ...]:
        """The process groups that hold the other summands."""
        return self.stack.process_groups(self.axes)

    def divided(self, total: Tensor) -> Tensor:
        """The mean in the compute dtype, from the sums over all elements."""
        return (total / self.stack.logical_size(self.axes)).to(self.stack.dtype)


class Statistics:
    """The statistics of a batch in one step.

    Args:
        batch: The batch.
        number: A function that returns the value of a symbol that is no statistic, or the argument itself where it is
            no symbol.

    Attributes:
        values: For each symbol that has been computed, the stacked values of each stack.
    """

    def __init__(self, batch: Batch, number: Callable[[Any], Any]) -> None:
        self.batch, self.number = batch, number
        self.values: dict[Symbol, list[Tensor]] = {}
        self._flat: dict[tuple[Symbol, torch.dtype], Tensor] = {}

    @functools.cached_property
    def stacks(self) -> Stacks:
        """The stacks of the batch."""
        return Stacks.of(self.batch)

    def evaluate(self, symbol: Symbol) -> None:
        """Compute a statistic that is no mean and whose arguments have values."""
        if symbol.name == "statistic":
            slot = symbol.args[0]
            stacked = (_stacked(stack, slot, symbol.axes) for stack in self.stacks.stacks)
            self.values[symbol] = [x.to(stack.dtype) for x, stack in zip(stacked, self.stacks.stacks, strict=True)]
            return
        of_stacks = enumerate(self.stacks.stacks)
        self.values[symbol] = [
            _called(symbol.name, [self._argument(arg, i, stack) for arg in symbol.args]) for i, stack in of_stacks
        ]

    def _argument(self, arg: Any, i: int, stack: Stack) -> Any:
        if is_statistic(arg):
            return self.values[arg][i]
        number = self.number(arg)
        if not isinstance(number, Tensor):
            return number
        if number.dtype != torch.bool:
            number = number.to(stack.dtype)
        if number.dim():
            number = number if len(stack.positions) == len(number) else number[stack.positions_on_device]
            number = number.view(-1, *[1] * stack.params[0].param.dim())
        return number

    def means(self, symbol: Symbol, sums: list[Tensor] | None) -> list[Mean]:
        """A mean of each stack before it is divided.

        Args:
            symbol: The mean.
            sums: The sums over the local elements of each stack, where the argument has one value per element.
        """
        found = []
        for i, stack in enumerate(self.stacks.stacks):
            if sums is None:
                dims = stack.params[0].param.dim()
                along = [axis % dims + 1 for axis in as_axes(symbol.args[1])]
                total = self.values[symbol.args[0]][i].sum(along, keepdim=True, dtype=torch.float64)
            else:
                total = sums[i]
            found.append(Mean(symbol, stack, total))
        return found

    def flat(self, symbol: Symbol, dtype: torch.dtype) -> Tensor:
        """The values of a statistic for all stacks of a compute dtype, as passes read them."""
        if (symbol, dtype) not in self._flat:
            of_dtype = [
                x.to(dtype).reshape(-1)
                for x, stack in zip(self.values[symbol], self.stacks.stacks, strict=True)
                if stack.dtype == dtype
            ]
            self._flat[symbol, dtype] = torch.cat(of_dtype) if len(of_dtype) > 1 else of_dtype[0].contiguous()
        return self._flat[symbol, dtype]

    def write(self, slot: str, symbol: Symbol) -> None:
        """Write the new values of a slot, or of the parameter."""
        for values, stack in zip(self.values[symbol], self.stacks.stacks, strict=True):
            held = [i for i, param in enumerate(stack.params) if param.numel]  # the mean of no elements is no number
            if not held:
                continue
            targets = [stack.params[i].param if slot == "p" else stack.params[i].state[slot] for i in held]
            new = values.unbind()
            torch._foreach_copy_(targets, [new[i].expand_as(x) for i, x in zip(held, targets, strict=True)])


def _stacked(stack: Stack, slot: str, axes: frozenset[Any]) -> Tensor:
    """The values of a slot. Passes read as many numbers as the parameter has rows, so another shape is refused."""
    shape, held = torch.Size(stack.shape(axes)[1:]), [param.state[slot] for param in stack.params]
    for value in held:
        if value.shape != shape:
            raise RuntimeError(
                f"{slot} has the shape {tuple(value.shape)}, and its parameter needs {tuple(shape)}. Did the parameter "
                "change after the first step? Make the optimizer anew, or call its reset()."
            )
    return torch.stack(held)


def _called(name: str, args: Sequence[Any]) -> Any:
    """A function of statistics, as torch computes it when the update is called on tensors."""
    if name == "where" and not isinstance(args[0], Tensor):
        return args[1] if args[0] else args[2]
    if name == "div" and not isinstance(args[0], Tensor):
        return args[1].reciprocal() * args[0]  # as torch divides a number by a tensor
    return apply(name, *args)
