"""The squared norm of the full gradient from gradients of batches, without the noise that makes it look larger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.errors import OptionError, is_number, shown


@dataclass(frozen=True)
class FullGradient:
    """The squared norm of the gradient without noise.

    Attributes:
        square: |G|^2, unbiased, so it may be negative.
        error: Its standard error.
        plug_in: The squared norm of the mean gradient, which noise makes larger.
        noise: tr(Sigma_b), the summed variance of the gradient of one batch.
    """

    square: float
    error: float = 0.0
    plug_in: float = math.nan
    noise: float = 0.0

    @property
    def noise_share(self) -> float:
        """The share of the noise in the expected squared norm of a batch's gradient."""
        total = max(self.square, 0.0) + self.noise
        return self.noise / total if total > 0 else math.nan


def full_gradient(gradients: Tensor | Sequence[Any]) -> FullGradient:
    """The squared norm of the full gradient, from gradients of batches at the same parameters, without their noise.

    |G|^2 = |g|^2 - tr(Sigma_b) / m for m batches with the mean g; the same as the mean of <g_a, g_b> over pairs of
    different batches. Standard error by the jackknife over batches.

    Args:
        gradients: (batches, parameters), or one full gradient (parameters,), taken to be free of noise; or a sequence
            with the gradient of each batch.

    Raises:
        OptionError: if there are no numbers, if batches have different numbers of them, or for NaN or infinity.

    Example:
        >>> found = full_gradient(torch.tensor([(1.0, 0.0), (0.0, 2.0), (3.0, 1.0), (-1.0, 1.0)]))
        >>> round(found.plug_in, 10), round(found.noise, 10), round(found.square, 10)
        (1.5625, 3.5833333333, 0.6666666667)
    """
    rows = flat_rows("full_gradient", "gradients", gradients)
    g = torch.stack(rows).double() if rows else torch.zeros(0, dtype=torch.float64, device="cpu")
    whole = gradients.ndim < 2 if isinstance(gradients, Tensor | np.ndarray) else all(map(is_number, gradients))
    g = g.reshape(-1) if whole else g
    if not g.numel():
        raise OptionError("full_gradient: gradients is empty. Give the gradients of two batches or more, or one.")
    if not bool(g.isfinite().all()):
        raise OptionError("full_gradient: a gradient is NaN or infinite.")
    if g.dim() == 1 or len(g) == 1:
        return FullGradient(float((g * g).sum()), 0.0, float((g * g).sum()), 0.0)
    mean = g.mean(0)
    return from_products((g * g).sum(1), g @ mean, float(mean @ mean))


def flat_rows(owner: str, name: str, vectors: Any) -> list[Tensor]:
    """A sequence of vectors, each a tensor, an array, a number or a sequence of such, as flat tensors of one length.

    Args:
        owner: The function that the user called, for messages.
        name: Its argument.
        vectors: The sequence.

    Raises:
        OptionError: if it is none, or if vectors have different lengths.

    Example:
        >>> flat_rows("example", "iterates", [(torch.ones(2), torch.zeros(1, 1)), [3, 2, 1.0]])
        [tensor([1., 1., 0.]), tensor([3., 2., 1.], dtype=torch.float64)]
    """
    try:
        whole = isinstance(vectors, Tensor | np.ndarray) and vectors.ndim == 0
        rows = [_flat(vector) for vector in ([vectors] if whole else vectors)]
    except TypeError:
        raise OptionError(
            f"{owner}: {name}={shown(vectors)} must be a tensor of real numbers, one row for each, or a sequence of "
            "tensors or of lists of tensors."
        ) from None
    if len({len(row) for row in rows}) > 1:
        raise OptionError(f"{owner}: {name} have different numbers of parameters.")
    return rows


def _flat(vector: Any) -> Tensor:
    if isinstance(vector, Tensor | np.ndarray):
        found = (torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector).detach().reshape(-1)
        if found.is_complex():
            raise TypeError
        return found
    if is_number(vector):
        return torch.tensor([vector], dtype=torch.float64, device="cpu")
    if isinstance(vector, str | bytes | dict):
        raise TypeError
    return torch.cat([_flat(part) for part in vector])


def from_products(squares: Tensor, products: Tensor, whole: float) -> FullGradient:
    """The same from |g_b|^2 and <g_b, g> of each batch and |g|^2 of the mean, which need no gradient any more."""
    m = len(squares)
    noise = float((squares - whole).sum()) / (m - 1)
    square = whole - noise / m
    if m < 3:
        return FullGradient(square, math.inf, whole, noise)
    of_rest = (m * m * whole - 2 * m * products + squares) / (m - 1) ** 2
    noises = ((squares.sum() - squares) - (m - 1) * of_rest) / (m - 2)
    without = of_rest - noises / (m - 1)
    error = math.sqrt(float((without - without.mean()).square().sum()) * (m - 1) / m)
    return FullGradient(square, error, whole, noise)
