"""Axes along which means are taken."""

from __future__ import annotations

from typing import Any

import torch


def as_axes(axis: Any) -> frozenset[Any]:
    """One axis, or a tuple of several, as a set."""
    return frozenset(axis if isinstance(axis, tuple) else (axis,))


def factored_axes(shape: torch.Size, largest: bool = False, smallest: int = 0) -> tuple[int, int] | tuple[None, None]:
    """The row axis and the column axis of a tensor as negative indices; None for both where it is not factored.

    Args:
        shape: The logical shape of the tensor.
        largest: Use the two largest axes instead of the last two. Of axes of equal size the later ones are used.
        smallest: Do not factor if one of the two axes is shorter than this.

    Example:
        >>> factored_axes(torch.Size([64, 32, 3, 3])), factored_axes(torch.Size([64, 32, 3, 3]), largest=True)
        ((-2, -1), (-4, -3))
        >>> factored_axes(torch.Size([8])), factored_axes(torch.Size([8, 4]), smallest=5)
        ((None, None), (None, None))
    """
    axes = list(range(-len(shape), 0))
    if largest:
        axes = sorted(sorted(axes, key=lambda axis: (shape[axis], axis))[-2:])
    if len(axes) < 2 or min(shape[axes[-2]], shape[axes[-1]]) < smallest:
        return None, None
    return axes[-2], axes[-1]
