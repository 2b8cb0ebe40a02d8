"""The diagonal of the Hessian from random probes, and how uneven it is.

Hutchinson 1989; Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix". R_med is Jiang, Malik & Li
2023, "How does adaptive optimization impact local neural network geometry?", arXiv:2211.02254.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.analysis.closures import Closure
from lightning_optim.analysis.products import Products, Way, products_of
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.errors import OptionError, check, is_whole

RESAMPLES = 8  # values of R_med under other errors of the diagonal; their scatter is known to a quarter
FIRST_RESAMPLE = 2**31  # vectors from here on are none of the probes


class Diagonal(list[Tensor]):
    """The estimated diagonal of a Hessian: one tensor for each parameter, shaped and sharded like it.

    Attributes:
        standard_error: The standard error of each element: one tensor for each parameter; infinite after one probe.
        params: The parameters.
        probes: The number of probes.
    """

    def __init__(
        self, values: Iterable[Tensor], error: Iterable[Tensor], params: Sequence[Tensor], probes: int
    ) -> None:
        super().__init__(values)
        self.standard_error, self.params, self.probes = list(error), list(params), probes

    def of(self, i: int) -> Diagonal:
        """The diagonal of parameter number i alone."""
        return Diagonal([self[i]], [self.standard_error[i]], [self.params[i]], self.probes)


def hessian_diagonal(
    closure: Closure,
    params: Iterable[Tensor],
    probes: int = 100,
    seed: int = 0,
    products: Way | None = None,
) -> Diagonal:
    """Estimate the diagonal of the Hessian of a loss, with the standard error of each element.

    The mean of z * Hz over random z of +1 and -1 (Hutchinson). The variance of an element is that of the rest of its
    row: the sum of its squares over the number of probes. It is not small compared to a small element. A probe costs
    one product, about 2 to 3 training steps on the same batch; memory is that of five vectors.

    Args:
        closure: Returns the mean loss of fixed batches as a scalar tensor with its graph. On several ranks each has its
            part of the batch.
        params: The parameters: plain tensors, or those of FSDP.
        probes: The number of probes. The error falls with its root.
        seed: The seed of the probes. They do not depend on how parameters are sharded, and no generator is touched.
        products: "autograd" differentiates twice; "differences" needs one derivative. None takes autograd where that
            can be, and says so where it cannot.

    Returns:
        A list of tensors, one for each parameter, shaped and sharded like it, with `standard_error`.

    Raises:
        OptionError: if an argument, the closure or its loss cannot serve.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> diagonal = hessian_diagonal(lambda: (x**3).sum(), [x], probes=2)
        >>> diagonal, diagonal.standard_error
        ([tensor([ 6., 12.])], [tensor([0., 0.])])
    """
    check("hessian_diagonal", "probes", probes, is_whole(probes), "an integer of at least 1")
    check("hessian_diagonal", "seed", seed, is_whole(seed, 0), "an integer of at least 0")
    with products_of("hessian_diagonal", closure, params, "hessian", products) as times:
        return diagonal_of(times, probes, seed)


def diagonal_of(times: Products, probes: int, seed: int, after: Callable[[], Any] | None = None) -> Diagonal:
    """The diagonal from products. See `hessian_diagonal`; `after` is called after each of them."""
    space = times.space
    mean, spread = space.zeros(), space.zeros()
    for number in range(probes):
        z = space.random(seed, number, signs=True)
        found = times(z, math.sqrt(space.dimension))
        times.finite(float(space.dots(found[None], found)))
        found *= z
        step = found - mean  # Welford: the variance as a sum of squares that are small already
        mean += step / (number + 1)
        spread += step * (found - mean)
        if after is not None:
            after()
    error = spread.div_(probes * (probes - 1)).sqrt_() if probes > 1 else spread.fill_(math.inf)
    return Diagonal(space.tensors(mean), space.tensors(error), space.params, probes)


class RMed(float):
    """The largest absolute value of a diagonal over their median.

    Attributes:
        error: The root mean square error that follows from the standard errors of the diagonal: 0 for exact values.
        largest: The largest absolute value.
        median: The median of the absolute values.
        zeros: How many elements are zero.
    """

    error: float
    largest: float
    median: float
    zeros: int

    def __new__(cls, largest: float, median: float, zeros: int, error: float = 0.0) -> RMed:
        made = super().__new__(cls, largest / median if median else math.inf)
        made.largest, made.median, made.zeros, made.error = largest, median, zeros, error
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.largest, self.median, self.zeros, self.error


@torch.no_grad()
def r_med(diagonal: Sequence[Tensor], nonzero_only: bool = False, seed: int = 0) -> RMed:
    """How uneven the diagonal of a Hessian is: max |H_ii| / median |H_ii| over all elements, at least 1.

    It is a condition number that is seen coordinate by coordinate, which is how adaptive methods see a loss.

    Errors of the diagonal raise the median, and so lower R_med. How much is found by adding errors of the same size
    once more: `error` is the root mean square of the changes. Take more probes until it is small.

    Args:
        diagonal: The result of `hessian_diagonal`, or a list of tensors, which are then taken as exact.
        nonzero_only: Leave out elements that are exactly zero: of dead units, or of rows that no batch has used.
        seed: The seed of the added errors.

    Returns:
        A float, the same on every rank, with `error`, `largest`, `median` and `zeros`. It is infinite where half of the
        elements are zero.

    Raises:
        OptionError: if there is no element, or if one is not finite.

    Example:
        >>> found = r_med([torch.tensor([[1.0, -2.0], [8.0, 3.0]])])
        >>> found, found.median, found.error
        (3.2, 2.5, 0.0)
    """
    values = list(diagonal)
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise OptionError("r_med: diagonal must be a list of tensors, as hessian_diagonal returns it; it is not.")
    params = diagonal.params if isinstance(diagonal, Diagonal) else [value.detach() for value in values]
    space = Vectors(params)
    found = space.flat(values)
    if not math.isfinite(float(space.dots(found[None], found))):
        raise OptionError("r_med: the diagonal has elements that are not finite. Is the loss finite?")
    exact = _ratio(space, found, nonzero_only)
    if not isinstance(diagonal, Diagonal) or math.isinf(exact):
        return exact
    error = space.flat(diagonal.standard_error)
    if diagonal.probes == 1:
        return RMed(exact.largest, exact.median, exact.zeros, math.inf)
    others = [
        _ratio(space, found + error * space.random(seed, FIRST_RESAMPLE + k), nonzero_only) for k in range(RESAMPLES)
    ]
    change = math.sqrt(sum((other - exact) ** 2 for other in others) / RESAMPLES)
    return RMed(exact.largest, exact.median, exact.zeros, change)


def _ratio(space: Vectors, values: Tensor, nonzero_only: bool) -> RMed:
    """R_med of exact values, (local,)."""
    sizes = values.abs()
    (zeros,) = _counts(space, sizes, [0.0])
    first = zeros if nonzero_only else 0
    count = space.dimension - first
    if count == 0:
        raise OptionError("r_med: the diagonal has no element that is not zero.")
    low, high, largest = _ordered(space, sizes, [first + (count - 1) // 2, first + count // 2, space.dimension - 1])
    return RMed(largest, (low + high) / 2, zeros)


def _ordered(space: Vectors, sizes: Tensor, places: Sequence[int]) -> list[float]:
    """The values at some places, from 0 on, of all values of all ranks in ascending order. None is negative.

    The bits of floating point numbers, read as an integer, are in the order of the numbers. So a value is found by
    bisection of an integer, in one message of counts for each bit, and no rank holds what belongs to others.
    """
    whole = torch.int64 if sizes.dtype == torch.float64 else torch.int32
    infinity = torch.tensor(math.inf, dtype=sizes.dtype, device="cpu").view(whole)
    low, high = [-1] * len(places), [int(infinity)] * len(places)
    while any(b - a > 1 for a, b in zip(low, high, strict=True)):
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        bounds = torch.tensor(middle, dtype=whole, device="cpu").view(sizes.dtype)
        for i, count in enumerate(_counts(space, sizes, bounds.tolist())):
            if count > places[i]:
                high[i] = middle[i]
            else:
                low[i] = middle[i]
    found: list[float] = torch.tensor(high, dtype=whole, device="cpu").view(sizes.dtype).tolist()
    return found


def _counts(space: Vectors, sizes: Tensor, bounds: Sequence[float]) -> list[int]:
    """How many values of all ranks are at most each of some bounds."""
    below = torch.stack([(sizes <= bound).to(sizes.dtype) for bound in bounds])
    return [int(count) for count in space.dots(below, torch.ones_like(sizes))]
