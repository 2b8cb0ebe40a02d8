"""The spectral density of the Hessian, or of the generalised Gauss-Newton matrix, of a loss, and its trace.

Stochastic Lanczos quadrature: Ubaru, Chen & Saad 2017, "Fast estimation of tr(f(A))"; Ghorbani, Krishnan & Xiao 2019,
"An investigation into neural net optimization via Hessian eigenvalue density", arXiv:1901.10159.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optim.analysis.closures import Closure
from lightning_optim.analysis.lanczos import Quadrature, quadrature
from lightning_optim.analysis.products import Matrix, Multiplier, Way, products_of
from lightning_optim.errors import check, is_number, is_whole


class Curve(NamedTuple):
    """A function on a grid.

    Attributes:
        grid: (points,) float64, ascending.
        density: (points,) float64.
    """

    grid: Tensor
    density: Tensor


class SpectralDensity(Curve):
    """The density of the eigenvalues on a grid: the share of them in [a, b] is its integral, the whole integral is 1.

    Attributes:
        nodes: (probes, steps) float64: the Ritz values of each probe. Missing ones are NaN.
        weights: (probes, steps) float64: their weights, with sum 1 for each probe, and 0 where there is none.
        width: The standard deviation of the normal distribution that stands for an eigenvalue.
        dimension: Number of eigenvalues.
    """

    nodes: Tensor
    weights: Tensor
    width: float
    dimension: int

    def mean(self, power: int = 1) -> Tensor:
        """The mean of a power of the eigenvalues, as each probe sees it, (probes,)."""
        return (self.weights * self.nodes.nan_to_num().pow(power)).sum(1)

    @property
    def trace(self) -> float:
        """The estimate of the trace."""
        return float(self.dimension * self.mean().mean())

    @property
    def trace_error(self) -> float:
        """The standard error of the trace, from the differences between probes; NaN for one probe."""
        found = self.dimension * self.mean()
        return float(found.std() / math.sqrt(len(found))) if len(found) > 1 else math.nan


def spectral_density(
    closure: Closure,
    params: Iterable[Tensor],
    steps: int = 80,
    probes: int = 2,
    *,
    points: int = 1024,
    width: float | None = None,
    operator: Matrix = "hessian",
    products: Way | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """The density of the eigenvalues of a matrix of second derivatives, by stochastic Lanczos quadrature.

    For each probe, a random vector of elements +1 and -1, Lanczos yields a quadrature: `steps` nodes and weights. The
    density is the mean over probes of normal distributions at the nodes. Extreme eigenvalues that stand alone are
    nodes; where eigenvalues are dense, the nodes describe how many there are.

    Memory is `steps` + 1 vectors as large as the parameters. Without all of them eigenvalues would be found several
    times. Under DDP and FSDP call it on all ranks, as `extreme_eigenvalues`.

    Args:
        closure: As for `extreme_eigenvalues`.
        params: The parameters, a list of tensors with `requires_grad`.
        steps: Products for each probe. Where the dimension is smaller, the quadrature is exact for its probe.
        probes: Number of random vectors.
        points: Number of points of the grid.
        width: The standard deviation of a node, in units of an eigenvalue. If None 0.3 % of the range of the nodes, and
            at least the distance of two points.
        operator: "hessian" or "ggn".
        products: "autograd", "differences", or None to choose.
        seed: Of the probes, which are the same under every strategy.

    Returns:
        Grid and density, with the nodes, the trace and its error as attributes.

    Raises:
        OptionError: as `extreme_eigenvalues`.

    Example:
        >>> x = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
        >>> grid, density = spectral_density(lambda: (x**3).sum(), [x])
        >>> round(float(torch.trapezoid(density, grid)), 12)
        1.0
    """
    name = "spectral_density"
    with products_of(name, closure, params, operator, products) as times:
        return density_of(times, steps, probes, points=points, width=width, seed=seed, owner=name)


def density_of(
    times: Multiplier,
    steps: int = 80,
    probes: int = 2,
    *,
    points: int = 1024,
    width: float | None = None,
    seed: int = 0,
    owner: str = "density_of",
) -> SpectralDensity:
    """As `spectral_density`, of any symmetric matrix of which products are known."""
    for option, value in (("steps", steps), ("probes", probes)):
        check(owner, option, value, is_whole(value), "a whole number of at least 1")
    check(owner, "points", points, is_whole(points, 2), "a whole number of at least 2")
    check(owner, "seed", seed, is_whole(seed, 0), "a whole number of at least 0")
    good = width is None or (is_number(width) and 0 < width < math.inf)
    check(owner, "width", width, good, "None, or a positive number")
    found = []
    for number in range(probes):
        start = times.space.random(seed, number, signs=True)
        found.append(quadrature(lambda v: times(v, 1.0), times.space, start, steps, owner))
    return smoothed(found, times.space.dimension, points, width)


def smoothed(
    found: Sequence[Quadrature], dimension: int, points: int = 1024, width: float | None = None
) -> SpectralDensity:
    """The mean of the quadratures, each node a normal distribution."""
    most = max(len(one.nodes) for one in found)
    nodes = torch.full((len(found), most), math.nan, dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(nodes)
    for i, one in enumerate(found):
        nodes[i, : len(one.nodes)], weights[i, : len(one.nodes)] = one.nodes, one.weights
    at, share = nodes[weights > 0], weights[weights > 0] / len(found)
    low, high = float(at.min()), float(at.max())
    if width is None:
        # The grid reaches 5 widths further on both sides, so the distance of its points depends on the width.
        least = 1 / (points - 1 - 10) if points > 12 else 1.0
        width = max(math.sqrt(1e-5), least) * (high - low) or 1e-3 * max(abs(high), 1e-30)
    grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64, device="cpu")
    density = torch.zeros_like(grid)
    for node, weight in zip(at.tolist(), share.tolist(), strict=True):
        density += weight * torch.exp(-0.5 * ((grid - node) / width) ** 2)
    whole = float(torch.trapezoid(density, grid))
    result = SpectralDensity(grid, density / whole if whole else density)
    result.nodes, result.weights, result.width, result.dimension = nodes, weights, width, dimension
    return result
