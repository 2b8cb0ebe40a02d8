"""The learning rates of a candidate: its centre times factors, and further ones where the best lies at the edge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_optim.errors import OptionError, is_number, shown

FACTORS = (0.3, 1.0, 3.0)


def read_factors(factors: Iterable[float] | float) -> tuple[float, ...]:
    """The factors of a grid, sorted.

    Raises:
        OptionError: for no factor, one that is not a positive number, and one that is given twice.
    """
    found = tuple(factors) if isinstance(factors, Iterable) else (factors,)
    if not found or not all(is_number(factor) and 0 < factor < float("inf") for factor in found):
        raise OptionError(f"grid={shown(list(found))} must be factors above 0 on the learning rate, such as 0.3,1,3.")
    if len(set(found)) < len(found):
        raise OptionError(f"grid={shown(list(found))} has a factor twice.")
    return tuple(sorted(map(float, found)))


def rounded(lr: float) -> float:
    """A learning rate of three digits.

    Example:
        >>> rounded(0.1 + 0.2)
        0.3
    """
    return float(f"{lr:.3g}")


def rates(centre: float, factors: Sequence[float]) -> list[float]:
    """The grid around a centre.

    Example:
        >>> rates(1e-3, (0.3, 1, 3))
        [0.0003, 0.001, 0.003]
    """
    return sorted({rounded(centre * factor) for factor in factors})


def beyond(tried: Sequence[float], best: float) -> float | None:
    """The next learning rate beyond the edge at which the best lies; None where it is not at an edge.

    A grid of one learning rate has no edge: it is what the user wants.

    Example:
        >>> beyond([3e-4, 1e-3, 3e-3], 3e-3), beyond([3e-4, 1e-3, 3e-3], 3e-4), beyond([3e-4, 1e-3, 3e-3], 1e-3)
        (0.009, 9e-05, None)
    """
    ordered = sorted(tried)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    if best == ordered[0]:
        return rounded(best * best / ordered[1])
    return rounded(best * best / ordered[-2])
