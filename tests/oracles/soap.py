"""SOAP: Vyas et al. 2024, arXiv 2409.11321, as the authors' program: m is kept in the bases, v moves with columns.

Null directions of a factor are completed from unit vectors, and keep their direction, where the authors take what
LAPACK returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .driver import Array, Gradients, History, Params, decays, kept, snapshot, start, steps

EPS = float(np.finfo(np.float64).eps)


def soap(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    frequency: int = 10,
    max_precond_dim: int = 10000,
    view: str = "matrix",
    merge_dims: bool = False,
    precondition_1d: bool = False,
    correct_bias: bool = True,
    maximize: bool = False,
) -> History:
    """Adam in the eigenbases of running means of the gradient's products with itself along each axis."""
    beta_of_factors = betas[1] if shampoo_beta is None else shampoo_beta
    theta = start(params)
    memory: list[dict[str, Any]] = [{} for _ in theta]
    history: History = []

    def axes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) < 2:
            return shape
        if merge_dims:
            found: list[int] = []
            now = 1
            for size in shape:
                if now * size <= max_precond_dim:
                    now *= size
                elif now > 1:
                    found.append(now)
                    now = size
                else:
                    found.append(size)
            return tuple([*found, now] if now > 1 or not found else found)
        return shape if view == "axes" else (shape[0], int(np.prod(shape[1:])))

    def one(x: Array, g: Array, s: dict[str, Any], eta: float) -> Array:
        shape = axes_of(x.shape)
        g = g.reshape(shape)
        served = [size <= max_precond_dim and (len(x.shape) > 1 or precondition_1d) for size in shape]
        if "factors" not in s:
            s["t"], s["m"], s["v"] = 0, np.zeros(shape), np.zeros(shape)
            s["factors"] = [(1 - beta_of_factors) * gram(g, i) if use else None for i, use in enumerate(served)]
            s["bases"] = [None if factor is None else first_basis(factor) for factor in s["factors"]]
            return x
        s["t"] += 1
        turned = project(g, s["bases"])
        s["m"] = betas[0] * s["m"] + (1 - betas[0]) * turned
        s["v"] = betas[1] * s["v"] + (1 - betas[1]) * turned**2
        size = eta
        if correct_bias:
            size *= np.sqrt(1 - betas[1] ** s["t"]) / (1 - betas[0] ** s["t"])
        u = size * unproject(s["m"] / (np.sqrt(s["v"]) + eps), s["bases"]).reshape(x.shape)
        shares = eta * weight_decay * decays(x, u)
        x = x - kept(u, g.reshape(x.shape))
        x = x - shares * x
        s["factors"] = [
            None if f is None else beta_of_factors * f + (1 - beta_of_factors) * gram(g, i)
            for i, f in enumerate(s["factors"])
        ]
        if s["t"] % frequency == 0:
            original = unproject(s["m"], s["bases"])
            for i, (factor, basis) in enumerate(zip(s["factors"], s["bases"], strict=True)):
                if factor is not None:
                    order = np.argsort(-np.diag(basis.T @ factor @ basis), kind="stable")
                    s["v"] = np.take(s["v"], order, axis=i)
                    s["bases"][i] = power_step(factor, basis[:, order])
            s["m"] = project(original, s["bases"])
        return x

    for eta, g in steps(gradients, lr, lrs, maximize):
        for j, g_j in enumerate(g):
            if g_j is not None:
                theta[j] = np.asarray(one(theta[j], g_j, memory[j], eta))
        history.append(snapshot(theta))
    return history


def gram(g: Array, axis: int) -> Array:
    """The contraction of g with itself over all axes but one."""
    others = [i for i in range(g.ndim) if i != axis]
    return np.asarray(np.tensordot(g, g, axes=(others, others)))


def project(x: Array, bases: Sequence[Array | None]) -> Array:
    """Coordinates in the bases: each contraction moves an axis to the end, so after all of them they are in order."""
    for basis in bases:
        x = np.moveaxis(x, 0, -1) if basis is None else np.tensordot(x, basis, axes=((0,), (0,)))
    return x


def unproject(x: Array, bases: Sequence[Array | None]) -> Array:
    """Back from the coordinates in the bases."""
    return project(x, [None if basis is None else basis.T for basis in bases])


def householder(a: Array) -> tuple[Array, Array]:
    """Q and R with a diagonal of R that is not negative."""
    q, r = np.linalg.qr(a)
    flip = np.where(np.diag(r) < 0, -1.0, 1.0)
    return q * flip, flip[:, None] * r


def first_basis(factor: Array) -> Array:
    """Eigenvectors in falling order; a null space is completed from e_1, e_2, ..."""
    n = len(factor)
    values, vectors = np.linalg.eigh(factor)
    rank = int(np.sum(values > 4 * n * EPS * values.max()))
    vectors = vectors[:, ::-1]
    return vectors if rank == n else householder(np.hstack([vectors[:, :rank], np.eye(n)[:, : n - rank]]))[0]


def power_step(factor: Array, basis: Array) -> Array:
    """One step of orthogonal iteration, whose dependent columns keep their direction as far as the others let them."""
    n = len(factor)
    image = factor @ basis
    q, r = householder(image)
    bad = np.abs(np.diag(r)) <= 32 * n * EPS * np.abs(r).max()
    if not bad.any():
        return q
    order = [*np.flatnonzero(~bad), *np.flatnonzero(bad)]
    columns = np.where(bad, basis, image)[:, order]
    found = np.empty_like(q)
    found[:, order] = householder(columns)[0]
    return found
