"""The signature of a launch: what its local parameters have in common. It selects the kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lightning_optim.storage.format import Format

FIXED = 2  # columns of the address table before the addresses: the first tile and the number of elements
# The fields of `GlobalIndex` and of its `exchange`, in columns of the address table.
INDEX = ("tensor", "first", "run", "stride", "rows", "columns", "unit")


@dataclass(frozen=True)
class Numbers:
    """The layout of a local parameter as columns of the table.

    Attributes:
        numbers: The sizes of its axes, and the start and the strides of each kind of statistic.
        axes: The number of axes.
        statistics: The number of kinds of statistics.
    """

    numbers: tuple[int, ...] = ()
    axes: int = 0
    statistics: int = 0


@dataclass(frozen=True)
class Signature:
    """Names and formats of the per-element operands of a launch.

    Attributes:
        operands: `"p"`, `"g"` and slots in the order of the address table, each with the dtype or the format in which
            it is stored.
        aligned: The operands whose addresses are all multiples of 16.
        indexed: Whether the table holds the global index of each local parameter, as normal numbers need it.
        axes: The number of axes of a layout, where the table holds the layout of each local parameter.
        statistics: The number of kinds of statistics in a layout.
    """

    operands: tuple[tuple[str, torch.dtype | Format], ...]
    aligned: frozenset[str] = frozenset()
    indexed: bool = False
    axes: int = 0
    statistics: int = 0

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the operands that are not quantized."""
        return {name: stored for name, stored in self.operands if isinstance(stored, torch.dtype)}

    @functools.cached_property
    def formats(self) -> dict[str, Format]:
        """The formats of the quantized operands. A partner precedes the operands that need it."""
        quantized = [(name, stored) for name, stored in self.operands if isinstance(stored, Format)]
        return dict(sorted(quantized, key=lambda item: item[1].partner is not None))

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """The first column of each operand in the address table, of the global index and of the layout.

        A quantized operand has two columns: the address of its codes and that of its scales.
        """
        offsets, offset = {}, FIXED
        for name, stored in self.operands:
            offsets[name] = offset
            offset += 2 if isinstance(stored, Format) else 1
        offsets["index"] = offset
        offsets["layout"] = offset + (len(INDEX) if self.indexed else 0)
        return offsets

    def start(self, which: int) -> int:
        """The column of the start of a kind of statistic. The columns of its strides follow."""
        return self.offsets["layout"] + self.axes + which * (self.axes + 1)

    @property
    def width(self) -> int:
        """The number of columns of the address table."""
        return self.start(self.statistics) if self.axes else self.offsets["layout"]

    def partner(self, name: str) -> str | None:
        """The operand relative to whose values `name` is quantized, or None."""
        return self.formats[name].partner if name in self.formats else None

    def partners_first(self, names: Iterable[str]) -> list[str]:
        """Names of operands in an order in which a partner precedes the operands that need it."""
        return sorted(names, key=lambda name: self.partner(name) is not None)

    def with_partners(self, reads: Iterable[str], writes: Iterable[str]) -> set[str]:
        """The operands that a kernel loads: those that it reads, and the partners that their codes need.

        Args:
            reads: The operands that the program reads.
            writes: The operands that the kernel stores. The new values of a partner among them need not be loaded.
        """
        loaded, writes = set(reads), set(writes)
        loaded |= {partner for name in loaded if (partner := self.partner(name))}
        return loaded | {partner for name in writes if (partner := self.partner(name)) and partner not in writes}
