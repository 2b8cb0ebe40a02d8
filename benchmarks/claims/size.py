"""How large an experiment is: the tiny one of the tests, that of two cores, that of a GPU, or another width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_optim.errors import OptionError, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """What an experiment multiplies its own numbers by.

    Attributes:
        name: What the command calls it.
        width: Factor on widths of models.
        length: Factor on numbers of steps.
        most_seeds: The most seeds of an arm.
        whole: Whether grids are run whole; else only their ends.
    """

    name: str
    width: float = 1.0
    length: float = 1.0
    most_seeds: int = 1000
    whole: bool = True

    def wide(self, width: int, multiple: int = 4) -> int:
        """A width at this size, a multiple of `multiple`.

        Example:
            >>> Size("8", width=8).wide(32), TINY.wide(32)
            (256, 8)
        """
        return max(multiple, round(width * self.width / multiple) * multiple)

    def long(self, steps: int, least: int = 2) -> int:
        """A number of steps at this size, of at least `least`."""
        return max(least, round(steps * self.length))

    def seeds(self, count: int) -> int:
        """A number of seeds at this size."""
        return min(count, self.most_seeds)

    def some(self, values: Sequence[T]) -> tuple[T, ...]:
        """The values of a grid at this size: all, or the first and the last."""
        return tuple(values) if self.whole or len(values) < 2 else (values[0], values[-1])


TINY = Size("tiny", width=0.25, length=0.01, most_seeds=2, whole=False)
SMALL = Size("small")
LARGE = Size("large", width=8.0, length=10.0, most_seeds=5)
SIZES = {size.name: size for size in (TINY, SMALL, LARGE)}


def read_size(text: str) -> Size:
    """A size from its name, or from a number: so many times as wide as `small`.

    Raises:
        OptionError: for another word, and for a number that is not above 0.

    Example:
        >>> read_size("4")
        Size(name='4', width=4.0, length=1.0, most_seeds=1000, whole=True)
    """
    if text in SIZES:
        return SIZES[text]
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise OptionError(
            f"size={shown(text)} must be one of {', '.join(SIZES)}, or a number above 0: a factor on widths."
        )
    return Size(f"{factor:g}", width=factor)
