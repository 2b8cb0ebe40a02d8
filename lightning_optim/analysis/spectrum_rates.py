"""Learning rate and momentum from the spectrum of the Hessian.

Granziol, Zohren & Roberts 2022, JMLR 23(173), arXiv:2006.09092, whose code sets both while training; the optimal values
for a quadratic are Polyak's, 1964, "Some methods of speeding up the convergence of iteration methods".
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_optim import errors
from lightning_optim.analysis.batch_size import number
from lightning_optim.errors import is_number

Method = Literal["gradient_descent", "heavy_ball", "nesterov"]
Small = Literal["median", "least"]
SPIKE = 0.5  # the weight above which a value stands for the many eigenvalues that are almost zero


class Rates(NamedTuple):
    """Learning rate and momentum.

    Attributes:
        lr: Learning rate, in units of squared parameters over loss.
        momentum: Momentum, in [0, 1).
    """

    lr: float
    momentum: float


def heavy_ball(largest: float | Tensor, smallest: float | Tensor) -> Rates:
    """The rates with which SGD with momentum contracts fastest on a quadratic: each end by √momentum a step.

    Args:
        largest: The largest eigenvalue of its Hessian, above 0.
        smallest: The smallest eigenvalue, above 0 and at most `largest`.

    Raises:
        OptionError: if an eigenvalue is out of range.

    Example:
        >>> heavy_ball(10.0, 0.1)
        Rates(lr=0.330578512396694..., momentum=0.66942148760330...)
    """
    largest, smallest = _checked("heavy_ball", largest, smallest)
    total = math.sqrt(largest) + math.sqrt(smallest)
    return Rates((2 / total) ** 2, ((math.sqrt(largest) - math.sqrt(smallest)) / total) ** 2)


def gradient_descent(largest: float | Tensor, smallest: float | Tensor) -> Rates:
    """The learning rate with which gradient descent contracts fastest on a quadratic; no momentum.

    Args:
        largest: The largest eigenvalue of its Hessian, above 0.
        smallest: The smallest eigenvalue, above 0 and at most `largest`.

    Raises:
        OptionError: if an eigenvalue is out of range.

    Example:
        >>> gradient_descent(10.0, 0.1)
        Rates(lr=0.19801980198019..., momentum=0.0)
    """
    largest, smallest = _checked("gradient_descent", largest, smallest)
    return Rates(2 / (largest + smallest), 0.0)


def nesterov(largest: float | Tensor, smallest: float | Tensor) -> Rates:
    """Nesterov's rates for a strongly convex function: 1 / L, and (√L - √μ) / (√L + √μ) for eigenvalues in [μ, L].

    Args:
        largest: The largest eigenvalue of the Hessian, above 0.
        smallest: The smallest eigenvalue, above 0 and at most `largest`.

    Raises:
        OptionError: if an eigenvalue is out of range.

    Example:
        >>> nesterov(4.0, 1.0)
        Rates(lr=0.25, momentum=0.333333333333333...)
    """
    largest, smallest = _checked("nesterov", largest, smallest)
    low, high = math.sqrt(smallest), math.sqrt(largest)
    return Rates(1 / largest, (high - low) / (high + low))


METHODS = {"gradient_descent": gradient_descent, "heavy_ball": heavy_ball, "nesterov": nesterov}


def from_spectrum(values: Tensor, weights: Tensor, method: Method = "heavy_ball", small: Small = "median") -> Rates:
    """The rates for a spectrum that Lanczos has found.

    The Hessian of a network has negative eigenvalues and many near zero, so its smallest is no bound of a quadratic.
    The absolute values are taken. If one value has more than half of the weight it stands for those near zero and is
    left out. The smallest is then the median of the absolute values, or the least of them, which falls with every
    further step of Lanczos.

    Args:
        values: The Ritz values of Lanczos from one random vector, as `nodes[0]` of `spectral_density`.
        weights: The weight of each, which add up to 1: the squared first components of the eigenvectors of the
            tridiagonal matrix.
        method: "heavy_ball" for SGD with momentum, "gradient_descent" without, "nesterov" for Nesterov's momentum.
            "gradient_descent" always takes the median.
        small: Which value is the smallest: "median" or "least".

    Raises:
        OptionError: if all values are zero or one is not finite, if there is not one weight for each, or if an option
            is not one of those above.

    Example:
        >>> values, weights = torch.tensor([-1.0, 0.0, 4.0, 9.0]), torch.tensor([0.1, 0.6, 0.2, 0.1])
        >>> from_spectrum(values, weights, small="least") == heavy_ball(9.0, 1.0)
        True
    """
    errors.check_choice("from_spectrum", "method", method, list(METHODS))
    errors.check_choice("from_spectrum", "small", small, ["median", "least"])
    values, weights = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (values, weights))
    if values.dim() != 1 or values.shape != weights.shape or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise errors.OptionError(
            f"from_spectrum: values of shape {tuple(values.shape)} and weights of shape {tuple(weights.shape)} must be "
            "those of one probe, a weight of at least 0 for each value."
        )
    there = ~values.isnan() | (weights > 0)  # shorter probes of a density are filled up with NaN of weight 0
    values, weights = values[there], weights[there]
    sizes = values.abs()
    largest = float(sizes.max()) if len(sizes) else 0.0
    errors.check("from_spectrum", "values", values.tolist(), 0 < largest < math.inf, "finite, and not all zero")
    spike = int(weights.argmax())
    kept = sizes if float(weights[spike]) <= SPIKE or len(sizes) < 2 else torch.cat([sizes[:spike], sizes[spike + 1 :]])
    if method == "gradient_descent":  # its authors leave the spike in
        return gradient_descent(largest, _positive(median(sizes), largest))
    smallest = median(kept) if small == "median" else float(kept.min())
    return METHODS[method](largest, min(_positive(smallest, largest), largest))


def median(values: Tensor) -> float:
    """The middle value, and the mean of the two in the middle of an even number, which `torch.median` does not take.

    Example:
        >>> median(torch.tensor([4.0, 1.0, 3.0, 2.0]))
        2.5
    """
    ordered = values.detach().reshape(-1).double().sort().values
    low, high = (len(ordered) - 1) // 2, len(ordered) // 2
    return float((ordered[low] + ordered[high]) / 2)


def _positive(value: float, largest: float) -> float:
    """A value that may be zero by rounding, as a number above 0."""
    return max(value, 1e-16 * largest)


def _checked(owner: str, largest: float | Tensor, smallest: float | Tensor) -> tuple[float, float]:
    """Both as numbers, if they are in range."""
    largest, smallest = number(largest), number(smallest)
    errors.check(owner, "largest", largest, is_number(largest) and 0 < largest < math.inf, "a number above 0")
    between = is_number(smallest) and 0 < smallest <= largest
    errors.check(owner, "smallest", smallest, between, f"above 0 and at most {largest:g}, the largest eigenvalue")
    return largest, smallest
