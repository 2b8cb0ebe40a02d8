"""Which matrices a tensor is, for functions of whole matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optim.errors import OptionError


@dataclass(frozen=True)
class View:
    """A tensor as matrices one above the other: reshaped row by row to (sum(rows), columns), and cut between rows.

    Attributes:
        rows: The number of rows of each matrix.
        columns: The number of columns of all of them.
        axes: The axes into which functions of the matrices split the columns, for more than two axes; (columns,) if
            empty.
    """

    rows: tuple[int, ...]
    columns: int
    axes: tuple[int, ...] = ()

    def matrices(self, x: Tensor) -> tuple[Tensor, ...]:
        """The matrices of a whole tensor, each (rows, columns)."""
        return torch.split(x.reshape(sum(self.rows), self.columns), list(self.rows))

    def shape(self, i: int) -> tuple[int, ...]:
        """The shape in which functions see the matrix number i."""
        return (self.rows[i], *(self.axes or (self.columns,)))

    def side(self, side: str | int, i: int) -> int:
        """The length of a side of the matrix number i, or of an axis of its function."""
        if isinstance(side, int):
            return self.shape(i)[side]
        return {"rows": self.rows[i], "columns": self.columns}[side]

    def ranges(self, sides: Sequence[str | int], own: Collection[int]) -> tuple[tuple[int, int], ...]:
        """Where some matrices lie in a slot with these sides, in which all of them lie one behind the other."""
        ends = list(
            itertools.accumulate(math.prod(self.side(side, i) for side in sides) for i in range(len(self.rows)))
        )
        return tuple((low, high) for i, (low, high) in enumerate(zip([0, *ends], ends, strict=False)) if i in own)

    def slots(self, values: Tensor, sides: Sequence[str | int], own: Collection[int]) -> dict[int, Tensor]:
        """What some matrices have of a slot with these sides: views of its memory, where they lie one behind the other.

        Args:
            values: The slot of these matrices.
            sides: The sides of the slot.
            own: The indices of the matrices.
        """
        sizes = [high - low for low, high in self.ranges(sides, own)]
        parts = zip(sorted(own), torch.split(values.view(-1), sizes), strict=True)
        return {i: part.view([self.side(side, i) for side in sides]) for i, part in parts}

    def joined(self, matrices: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The tensor of a shape whose matrices these are."""
        return torch.cat(list(matrices)).view(shape)


def matrix_view(
    shape: torch.Size, blocks: int | Sequence[int] = 1, experts: bool = False, word: str = "blocks"
) -> View | None:
    """The view (outputs, all the rest) of a tensor, or None where it has fewer than two axes.

    Args:
        shape: The logical shape of the tensor.
        blocks: A number of equal blocks into which the rows fall, each a matrix of its own, or the rows of each block.
        experts: The first axis counts matrices: (experts, outputs, inputs).
        word: What the user calls the blocks, for messages.

    Raises:
        OptionError: where the rows do not fall into these blocks, and for experts of fewer than three axes.

    Example:
        >>> matrix_view(torch.Size([6, 4, 3, 3]), blocks=3)
        View(rows=(2, 2, 2), columns=36, axes=())
    """
    if experts and len(shape) < 3:
        raise OptionError(f"experts=True needs three axes (experts, outputs, inputs), and a tensor has {[*shape]}.")
    if len(shape) < 2:
        return None
    outer = 2 if experts else 1
    rows, columns = shape[outer - 1], shape[outer:].numel()
    sizes = [rows // max(blocks, 1)] * blocks if isinstance(blocks, int) else list(blocks)
    if sum(sizes) != rows or min(sizes, default=0) < min(rows, 1):
        raise OptionError(f"{word}={blocks!r} does not divide the {rows} rows of a tensor of shape {[*shape]}.")
    return View(tuple(sizes) * (shape[0] if experts else 1), columns)
