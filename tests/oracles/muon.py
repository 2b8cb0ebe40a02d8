"""Muon: Jordan et al. 2024; AdamW for what is no matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor

QUINTIC = (
    "4.0848 -6.8946 2.9270",
    "3.9505 -6.3029 2.6377",
    "3.7418 -5.5913 2.3037",
    "2.8769 -3.1427 1.2046",
    "2.8366 -3.0525 1.2012",
)
LAST = [(1.8750014808534479, -1.2500016453999487, 0.3750001645474248), (1.875, -1.25, 0.375)]


def polar_express(least: float = 1e-3, cushion: float = 0.02407327424182761) -> Iterator[tuple[float, float, float]]:
    """The odd polynomials of degree 5 that are nearest to 1 on what the ones before have left of [least, 1]."""
    low, high = least, 1.0
    while True:
        from_ = max(low, cushion * high)
        if from_ / high >= 1 - 5e-6:
            a, b, c = 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
        else:
            a, b, c = minimax(from_, high)

        def p(x: float, a: float = a, b: float = b, c: float = c) -> float:
            return a * x + b * x**3 + c * x**5

        if cushion * high > low:
            centred = 2 / (p(low) + p(high))
            a, b, c = a * centred, b * centred, c * centred
        yield a, b, c
        low = a * low + b * low**3 + c * low**5
        high = 2 - low


def minimax(low: float, high: float) -> tuple[float, float, float]:
    """Remez: p(x) = a x + b x^3 + c x^5 differs from 1 by E, with signs that alternate, at four points."""
    q, r, error = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf
    a = b = c = 0.0
    for _ in range(1000):
        points = np.array([low, q, r, high])
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, new = map(float, np.linalg.solve(system, np.ones(4)))
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        if abs(new - error) < 1e-15:
            break
        error = new
    return a, b, c


def triples(coefficients: str, steps: int) -> list[tuple[float, float, float]]:
    """The coefficients of each step."""
    if coefficients == "classic":
        return [(3.4445, -4.7750, 2.0315)] * steps
    if coefficients == "quintic":
        table = [tuple(map(float, line.split())) for line in QUINTIC]
    else:
        of_steps = polar_express()
        published = [next(of_steps) for _ in range(6)] + LAST  # of which rounding decides
        table = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in published]
    return [(a, b, c) for a, b, c in (table + table[-1:] * steps)[:steps]]


def orthogonalized(u: Array, coefficients: str = "polar_express", steps: int = 5, eps: float = 1e-12) -> Array:
    """Newton-Schulz on one matrix."""
    X = u / max(math.sqrt(float(np.sum(u * u))), eps)
    for a, b, c in triples(coefficients, steps):
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return np.asarray(X)


def factor(adjust: str, m: int, n: int) -> float:
    """The factor on the step of an m x n matrix."""
    return {
        "original": math.sqrt(max(1.0, m / n)),
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "spectral": math.sqrt(m / n),
        "none": 1.0,
    }[adjust]


def per_matrix(
    x: Array, of_matrix: Callable[[Array], Array], blocks: int | Sequence[int] | None, experts: bool
) -> Array:
    """Apply a function to each matrix of a tensor."""
    if experts:
        return np.stack([per_matrix(one, of_matrix, blocks, False) for one in x])
    rows = x.shape[0]
    sizes = [rows // blocks] * blocks if isinstance(blocks, int) else list(blocks or [rows])
    flat = x.reshape(rows, -1)
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return np.concatenate([of_matrix(part) for part in parts]).reshape(x.shape)


def muon(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    adjust: str = "match_rms_adamw",
    coefficients: str = "polar_express",
    steps: int = 5,
    eps: float = 1e-12,
    adamw_scale: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    normalize_rows: bool = False,
    beta2: float = 0.95,
    matrix: bool | None = None,
    blocks: int | Sequence[int] | None = None,
    heads: int | None = None,
    experts: bool = False,
    maximize: bool = False,
) -> History:
    """A matrix follows its orthogonalized momentum, everything else Adam."""

    def is_matrix(theta: Array) -> bool:
        if matrix is not None:
            return matrix
        return theta.ndim >= 2 and min(theta.shape[0], theta.size // theta.shape[0]) >= 2

    def of_matrix(u: Array) -> Array:
        return orthogonalized(u, coefficients, steps, eps)

    def scaled(u: Array) -> Array:
        return factor(adjust, *u.shape) * u

    def evened(u: Array, of_rows: list[Array], kept: list[Array]) -> Array:
        """NorMuon on one matrix; the mean squares of its rows are the next in `of_rows`, and go to `kept`."""
        o = of_matrix(u)
        before = of_rows[len(kept)] if of_rows else np.zeros(len(o))
        kept.append(beta2 * before + (1 - beta2) * np.mean(o * o, axis=1))
        even = o / (np.sqrt(kept[-1]) + 1e-10)[:, None]
        return scaled(even * np.linalg.norm(o) / (np.linalg.norm(even) + 1e-10))

    rows_of: dict[int, list[Array]] = {}

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        if not is_matrix(theta):
            eta = eta * adamw_scale
            s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
            s["v"] = betas[1] * s["v"] + (1 - betas[1]) * g * g
            m, v = s["m"] / (1 - betas[0] ** t), s["v"] / (1 - betas[1] ** t)
            return moved(theta, eta * m / (np.sqrt(v) + adamw_eps), g, eta * weight_decay)
        s["m"] = momentum * s["m"] + (1 - momentum) * g
        u = momentum * s["m"] + (1 - momentum) * g if nesterov else s["m"]
        kept: list[Array] = []
        of_rows = rows_of.get(id(s), [])
        each = (
            functools.partial(evened, of_rows=of_rows, kept=kept) if normalize_rows else lambda x: scaled(of_matrix(x))
        )
        o = per_matrix(u, each, heads or blocks, experts)
        rows_of[id(s)] = kept
        return moved(theta, eta * o, g, eta * weight_decay)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize, zeros=("m", "v"))
