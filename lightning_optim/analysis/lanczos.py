"""Lanczos with full reorthogonalisation: eigenvalues of a symmetric matrix of which only products are known.

Lanczos 1950, "An iteration method for the solution of the eigenvalue problem of linear differential and integral
operators"; Saad 2011, "Numerical methods for large eigenvalue problems", chapter 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optim.analysis.closures import check_finite
from lightning_optim.analysis.vectors import Vectors

Times = Callable[[Tensor], Tensor]
PASSES = 5  # of Gram-Schmidt; two are enough, except where nothing but rounding is left


class Basis:
    """Orthonormal vectors, one after the other, in memory that is there from the start.

    Args:
        space: The space of vectors.
        size: The largest number of vectors.

    Attributes:
        rows: (size + 1, local); the first `count` are the vectors.
        count: Their number.
    """

    def __init__(self, space: Vectors, size: int) -> None:
        self.space, self.count = space, 0
        self.rows = space.zeros(size + 1)

    def push(self, w: Tensor) -> tuple[Tensor, float]:
        """Orthogonalise a vector against those that are here, and keep it, with norm 1, as the next.

        Classical Gram-Schmidt, twice or more: each pass is one message of all inner products.

        Returns:
            Its coefficients along the vectors, (count before,) float64, and the norm of what is left of it. Where that
            is 0 or not finite, nothing is kept.
        """
        target, found = self.rows[self.count], self.rows[: self.count]
        target.copy_(w)
        total, rest = torch.zeros(self.count, dtype=torch.float64, device="cpu"), 0.0
        for i in range(PASSES):
            both = self.space.dots(self.rows[: self.count + 1], target)
            along, square = both[:-1], float(both[-1])
            target.addmv_(found.mT, along.to(target), alpha=-1)
            total += along
            removed = float(along @ along)
            rest = square - removed
            if i and removed <= 0.01 * square:
                break
        norm = math.sqrt(rest) if rest > 0 else 0.0 if rest <= 0 else rest
        if 0 < norm < math.inf:
            target /= norm
            self.count += 1
        return total, norm

    def combine(self, weights: Tensor) -> None:
        """Replace the vectors by combinations of them.

        Args:
            weights: (count, new count) float64 with orthonormal columns.
        """
        new = weights.shape[1]
        by = weights.mT.to(self.rows)
        chunk = max(1, self.rows.shape[1] // len(self.rows))  # a chunk is as large as one vector
        for low in range(0, self.rows.shape[1], chunk):
            part = self.rows[:, low : low + chunk]
            part[:new] = by @ part[: self.count]
        self.count = new

    def combination(self, weights: Tensor) -> Tensor:
        """A combination of the first vectors: (n,) float64 to (local,)."""
        return self.rows[: len(weights)].mT @ weights.to(self.rows)


class Quadrature(NamedTuple):
    """A Gauss quadrature of the spectrum as a vector v sees it: v^T f(A) v / v^T v is the sum of weights f(nodes).

    For polynomials f of degree below twice the number of nodes.

    Attributes:
        nodes: (steps,) float64, ascending: the Ritz values.
        weights: (steps,) float64; their sum is 1.
        diagonal: (steps,) of the tridiagonal matrix.
        beside: (steps - 1,) beside the diagonal.
        last: The norm of what the last product added to the basis; 0 where nothing was left.
    """

    nodes: Tensor
    weights: Tensor
    diagonal: Tensor
    beside: Tensor
    last: float


def quadrature(times: Times, space: Vectors, start: Tensor, steps: int, owner: str = "Lanczos") -> Quadrature:
    """Lanczos from one vector.

    Fewer steps are taken where the vector is a combination of fewer eigenvectors; the quadrature is exact then.

    Args:
        times: Multiplies the matrix by a vector of norm 1.
        space: The space of vectors.
        start: The vector, of any norm.
        steps: Number of products. As many vectors are held.
        owner: The function that the user called, for messages.

    Raises:
        OptionError: where a product is not finite.
    """
    basis = Basis(space, min(steps, space.dimension))
    basis.push(start)
    diagonal: list[float] = []
    beside: list[float] = []
    eps = torch.finfo(space.dtype).eps
    while True:
        along, norm = basis.push(times(basis.rows[basis.count - 1]))
        diagonal.append(float(along[len(diagonal)]))
        check_finite(owner, diagonal[-1] + norm)
        scale = max(map(abs, [*diagonal, *beside]))
        if len(diagonal) == min(steps, space.dimension) or norm <= 100 * eps * scale:
            break
        beside.append(norm)
    a, b = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (diagonal, beside))
    nodes, vectors = torch.linalg.eigh(torch.diag(a) + torch.diag(b, 1) + torch.diag(b, -1))
    return Quadrature(nodes, vectors[0].square(), a, b, norm)
