"""Global indices of the elements that a process holds: the same under every strategy and on any number of ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.names import plain_name
from lightning_optim.distributed.placement import shard_of


@dataclass(frozen=True, slots=True)
class GlobalIndex:
    """The global indices of the local elements of a tensor, in closed form.

    The local elements are `run` consecutive ones from `first` on, repeated every `stride`, in the row-major order of
    the whole tensor. A contiguous shard has `run == stride`.

    Attributes:
        tensor: A 32-bit number that identifies the tensor.
        first: The global index of the first local element.
        run: Number of consecutive elements, at least 1.
        stride: Distance between the starts of two runs.
        exchange: Where local elements are taken in the order of memory: `rows`, `columns` and `unit` of `exchange_of`.
    """

    tensor: int
    first: int = 0
    run: int = 1
    stride: int = 1
    exchange: tuple[int, int, int] = (1, 1, 1)

    @property
    def is_contiguous(self) -> bool:
        """Whether the global indices of the local elements are consecutive."""
        return self.run == self.stride and self.exchange == (1, 1, 1)

    def of(self, low: int, high: int, device: torch.device) -> Tensor:
        """The global indices of the local elements `low` to `high`, (high - low,) int64."""
        local = torch.arange(low, high, dtype=torch.int64, device=device)
        rows, columns, unit = self.exchange
        if self.exchange != (1, 1, 1):
            group, inside = local // unit, local % unit
            table, at = group // (rows * columns), group % (rows * columns)
            local = (table * (rows * columns) + at % columns * rows + at // columns) * unit + inside
        if self.run == self.stride:
            return local.add_(self.first)
        return self.first + torch.div(local, self.run, rounding_mode="floor") * self.stride + local % self.run


def exchange_of(order: Sequence[int], shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Describe an order of axes in memory as the exchange of two neighbouring groups of axes.

    Channels-last formats and transposed matrices are such orders. Memory holds tables of `rows` times `columns` units,
    and the tensor in its own order holds each of them transposed.

    Returns:
        rows, columns and unit; None where the order is another one.

    Example:
        >>> exchange_of((0, 2, 3, 1), (8, 3, 5, 5)), exchange_of((2, 1, 0), (2, 3, 4))
        ((25, 3, 1), None)
    """
    axes = [axis for axis in order if shape[axis] != 1]
    own = sorted(axes)
    while axes and axes[0] == own[0]:
        axes, own = axes[1:], own[1:]
    unit = 1
    while axes and axes[-1] == own[-1]:
        unit *= shape[axes[-1]]
        axes, own = axes[:-1], own[:-1]
    if not axes:
        return 1, 1, 1
    first = own.index(axes[0])
    if axes != own[first:] + own[:first]:
        return None
    return math.prod(shape[axis] for axis in own[first:]), math.prod(shape[axis] for axis in own[:first]), unit


def global_indices(named: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict[Tensor, GlobalIndex]:
    """The global indices of the elements of each parameter of an optimizer.

    A tensor is identified by its name in the unwrapped module, so that every strategy finds the same number for it.
    A parameter without a name is identified by its position in the optimizer.

    Args:
        named: Names and parameters of the module.
        optimizer: The optimizer.

    Raises:
        OptionError: where FSDP1 shows flat parameters (`use_orig_params=False`).
    """
    identifiers: dict[Tensor, int] = {}
    taken: set[int] = set()
    for name, p in named:
        number = zlib.crc32(plain_name(name).removeprefix("module.").encode())
        while number in taken:  # of 10^4 names, two agree in one model of a hundred
            number = (number + 1) & 0xFFFFFFFF
        taken.add(number)
        identifiers.setdefault(p, number)
    found = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        first, run, stride = (0, 1, 1) if is_lazy(p) else shard_of(p).runs()
        parts = 2 if p.is_complex() else 1  # real and imaginary parts are elements of their own
        number = identifiers.get(p, zlib.crc32(f"parameter {i}".encode()))
        found[p] = GlobalIndex(number, first * parts, run * parts, stride * parts)
    return found
