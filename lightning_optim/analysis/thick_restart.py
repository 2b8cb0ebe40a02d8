"""The outermost eigenvalues from a basis of fixed size: Lanczos with thick restarts.

Wu & Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems". When the basis is full, the
Ritz vectors at both ends of the spectrum replace it, and the iteration goes on. So memory does not depend on the number
of products. The projection of the matrix is measured, so that random vectors may be put in where the iteration has come
to an end: that is how further eigenvectors of a multiple eigenvalue are found, of which Lanczos sees one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optim.analysis.closures import check_finite
from lightning_optim.analysis.lanczos import Basis, Times
from lightning_optim.analysis.vectors import Vectors


class Ritz(NamedTuple):
    """Approximate eigenpairs.

    Attributes:
        values: (n,) float64, ascending.
        weights: (count, n): each vector as a combination of those of the basis.
        residuals: (n,) norms of A u - value u.
        noise: (n,) what of the residuals lies in the basis, since products are not quite those with a symmetric matrix.
    """

    values: Tensor
    weights: Tensor
    residuals: Tensor
    noise: Tensor

    def converged(self, which: list[int], allowed: float) -> bool:
        """Whether the residuals of some pairs are below a tolerance, or are mostly noise."""
        return bool((self.residuals[which] <= (1.5 * self.noise[which]).clamp(min=allowed)).all())


class ThickRestart:
    """Finds the k largest and the k smallest eigenvalues of a symmetric matrix.

    Args:
        times: Multiplies the matrix by a vector of norm 1.
        space: The space of vectors.
        k: How many, at most the dimension.
        size: Number of vectors of the basis: the dimension, or at least 2 k + 3.
        seed: Of the random vectors.
        owner: The function that the user called, for messages.

    Attributes:
        basis: The basis.
        products: Number of products so far.
        restarts: Number of restarts so far.
        scale: The largest absolute value of a Ritz value so far, a lower bound of the norm of the matrix.
        complete: Whether further copies of a multiple eigenvalue were looked for until there were none.
    """

    def __init__(self, times: Times, space: Vectors, k: int, size: int, seed: int = 0, owner: str = "Lanczos") -> None:
        self.times, self.space, self.k, self.size, self.seed = times, space, k, size, seed
        self.basis = Basis(space, size)
        self.owner, self.products, self.restarts, self.scale = owner, 0, 0, 0.0
        self.complete = k == 1
        self._randoms = 0
        self._lost = 0.0  # of a residual, where the vector behind it was dropped
        # A Q = Q H[:n, :n] + q H[n, :n] with n vectors Q and the next vector q.
        self._h = torch.zeros(size + 1, size, dtype=torch.float64, device="cpu")
        self._append_random()

    def run(self, steps: int, tolerance: Callable[[], float]) -> Ritz:
        """Iterate until the wanted pairs have residuals below the tolerance, or steps are over.

        Where k is more than 1, the iteration then goes on from a random vector, orthogonal to those that were found,
        until that finds nothing more at the ends of the spectrum.

        Args:
            steps: The largest number of products.
            tolerance: Returns that of residuals, relative to the norm of the matrix. It is called after a product.

        Raises:
            OptionError: where a product is not finite.
        """
        before: Tensor | None = None
        while True:
            n = self._step()
            if n % (1 if n < 50 else 10) and n < self.size and self.products < steps:
                continue
            ritz = self._ritz(n)
            allowed = tolerance() * self.scale
            if n == self.space.dimension or self.products >= steps:
                self.complete = self.complete or n == self.space.dimension
                return ritz
            wanted = self._wanted(n)
            if len(wanted) == 2 * self.k and ritz.converged(wanted, allowed + self._lost):
                values = ritz.values[wanted]
                same = before is not None and float((values - before).abs().max()) <= 2 * allowed + self._lost
                if self.k == 1 or (same and self._nothing_beyond(ritz, allowed)):
                    self.complete = True
                    return ritz
                if not same:
                    before = values
                    self._restart(ritz, wanted, onward=False)
                    continue
            if n == self.size:
                more = (self.size - 2 * self.k) // 4
                ends = [*range(self.k + more), *range(n - self.k - more, n)]
                self._restart(ritz, ends, onward=True)

    def vector(self, ritz: Ritz, i: int) -> Tensor:
        """Ritz vector i of the last run, (local,), with norm 1."""
        u = self.basis.combination(ritz.weights[:, i])
        return u.div_(self.space.norm(u))

    # ---------------------------------------------------------------- inside

    def _step(self) -> int:
        """One product; the number of vectors whose products are known."""
        n = self.basis.count
        along, norm = self.basis.push(self.times(self.basis.rows[n - 1]))
        self.products += 1
        check_finite(self.owner, float(along.sum()) + norm)
        self._h[:n, n - 1] = along
        self.scale = max(self.scale, float(along.norm()))
        if n == self.space.dimension:
            self.basis.count = n
        elif norm <= 100 * torch.finfo(self.space.dtype).eps * self.scale:  # the vectors span an invariant subspace
            self.basis.count = n
            self._lost = max(self._lost, norm)
            self._append_random()
        else:
            self._h[n, n - 1] = norm
        return n

    def _append_random(self) -> None:
        for _ in range(3):
            _, norm = self.basis.push(self.space.random(self.seed, self._randoms))
            self._randoms += 1
            if norm > 0:
                return

    def _ritz(self, n: int) -> Ritz:
        """Eigenpairs of the projected matrix, which is symmetric up to rounding."""
        h = self._h[:n, :n]
        symmetric = (h + h.mT) / 2
        values, weights = torch.linalg.eigh(symmetric)
        self.scale = max(self.scale, float(values.abs().max()))
        noise = ((h - symmetric) @ weights).norm(dim=0)
        residuals = torch.hypot(noise, self._h[n, :n] @ weights)
        return Ritz(values, weights, residuals + self._lost, noise)

    def _wanted(self, n: int) -> list[int]:
        return sorted({*range(min(self.k, n)), *range(max(0, n - self.k), n)})

    def _nothing_beyond(self, ritz: Ritz, allowed: float) -> bool:
        """Whether the next pairs inwards are known well enough to be no further wanted ones."""
        values = ritz.values
        for inner, outer in ((self.k, self.k - 1), (-self.k - 1, -self.k)):
            apart = abs(float(values[inner] - values[outer]))
            if not ritz.converged([inner], max(allowed + self._lost, apart / 10)):
                return False
        return True

    def _restart(self, ritz: Ritz, kept: list[int], onward: bool) -> None:
        """Keep some Ritz vectors, and go on from where the iteration is (`onward`), or from a random vector."""
        n, new = self.basis.count - 1, len(kept)
        self.restarts += 1
        weights = ritz.weights[:, kept]
        following = self.basis.rows[n].clone() if onward else None
        coupling = self._h[n, :n] @ weights
        self.basis.count = n
        self.basis.combine(weights)
        self._h.zero_()
        self._h[:new, :new] = torch.diag(ritz.values[kept])
        if following is not None:
            self.basis.rows[new] = following
            self.basis.count += 1
            self._h[new, :new] = coupling
        else:
            self._lost = max(self._lost, float(coupling.abs().max()))
            self._append_random()
