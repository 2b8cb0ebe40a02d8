"""The largest and the smallest eigenvalues of the Hessian, or of the generalised Gauss-Newton matrix, of a loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optim.analysis.closures import Closure
from lightning_optim.analysis.products import Matrix, Multiplier, Way, products_of
from lightning_optim.analysis.thick_restart import ThickRestart
from lightning_optim.errors import check, is_number, is_whole

STEPS = 200
SMALL = 2**20  # elements: a basis below it may be larger than needed


class Extremes(NamedTuple):
    """The ends of a spectrum.

    Attributes:
        largest: (k,) float64, descending.
        smallest: (k,) float64, ascending; negative where the matrix is indefinite.
        bound: (2, k) float64, of the errors of `largest` and of `smallest`: the norm of the residuals of these k
            vectors, and rounding. Within this distance there are k eigenvalues, one for each (Kahan 1967). Where the
            bound is not small, these need not be the outermost ones: more steps are needed. Where steps were over
            before it was sure that no copy of a multiple eigenvalue is missing, it reaches to the outermost value.
    """

    largest: Tensor
    smallest: Tensor
    bound: Tensor


def extreme_eigenvalues(
    closure: Closure,
    params: Iterable[Tensor],
    k: int = 1,
    steps: int | None = None,
    operator: Matrix = "hessian",
    products: Way | None = None,
    *,
    tolerance: float | None = None,
    basis: int | None = None,
    seed: int = 0,
) -> Extremes:
    """The k largest and the k smallest eigenvalues of a matrix of second derivatives, by Lanczos with thick restarts.

    Memory is that of the basis, `basis` + 1 vectors as large as the parameters, whatever the number of steps. Under
    DDP and FSDP call it on all ranks, each with its part of the batch: the loss is the mean over them, a product and
    a round of inner products are one message each, and shards of FSDP stay where they are.

    Args:
        closure: Takes nothing and returns the mean loss of fixed batches as a scalar tensor with its graph. For "ggn"
            it returns a pair: the outputs, and a function that computes the scalar loss from the outputs (under FSDP
            necessarily; elsewhere the loss itself, computed from these outputs, also serves). Batch norm in training
            mode sees its batches; keep its buffers yourself if they matter.
        params: The parameters, a list of tensors with `requires_grad`. One that the loss does not use has zero rows.
        k: How many at each end, at most the number of elements.
        steps: The largest number of products, 100 (k + 1) if None. It ends earlier where the tolerance is met.
        operator: "hessian", or "ggn": J^T H_L J with the Jacobian J of the outputs and the Hessian H_L of the loss as
            a function of the outputs.
        products: "autograd" is exact and differentiates twice. "differences" takes central differences of gradients,
            and needs no second derivative: relative errors of about 1e-9 in float64 and 1e-5 in float32. None takes
            autograd where the module and the strategy allow, and warns where they do not.
        tolerance: Residual relative to the largest absolute eigenvalue at which it ends. The error of an eigenvalue
            that stands alone is about its square. If None 1e-9 in float64 and 1e-4 in float32; by differences 1e-8
            and 5e-4.
        basis: Number of vectors that are kept, at least 2 k + 3 (or the number of elements, if that is less). If None
            4 k + 16, and for small models as many as fit in 2^20 elements.
        seed: Of the start vector, which is the same under every strategy.

    Returns:
        The eigenvalues and a bound of their errors. A multiple eigenvalue is there as often as it occurs.

    Raises:
        OptionError: if a parameter is frozen, complex or an integer; if no gradient path leads from the loss to the
            parameters; if the loss is no scalar, is not finite, or differs in two calls (dropout); if a product is not
            finite; if k or steps are out of range. It is raised on all ranks.

    Note:
        Lanczos 1950; Wu & Simon 2000; for products Pearlmutter 1994, "Fast exact multiplication by the Hessian". One
        vector leads to one copy of a multiple eigenvalue. So for k > 1 further random vectors follow until these find
        nothing more. Gradients, parameters and random generators are afterwards what they were, bit for bit.

    Example:
        >>> x = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
        >>> largest, smallest, bound = extreme_eigenvalues(lambda: (x**3).sum(), [x])
        >>> [round(float(value), 8) for value in (largest, smallest)]
        [12.0, -18.0]
    """
    name = "extreme_eigenvalues"
    with products_of(name, closure, params, operator, products) as times:
        return outermost(times, k, steps, tolerance=tolerance, basis=basis, seed=seed, owner=name)


def outermost(
    times: Multiplier,
    k: int = 1,
    steps: int | None = None,
    *,
    tolerance: float | None = None,
    basis: int | None = None,
    seed: int = 0,
    owner: str = "outermost",
) -> Extremes:
    """As `extreme_eigenvalues`, of any symmetric matrix of which products are known.

    Products by differences are those with a matrix that is off by the third derivatives, about as the square of the
    step. What they find is corrected: with the Ritz vector u and products of the steps h and 2 h, the quotient
    u^T A u is (4 u^T A_h u - u^T A_2h u) / 3 up to the fourth power of the step. So h can be twice what it is before.
    """
    dimension = times.space.dimension
    check(
        owner, "k", k, is_whole(k) and k <= dimension, f"a whole number from 1 to {dimension}, the number of elements"
    )
    least = min(2 * k + 3, dimension)
    steps = STEPS + 100 * (k - 1) if steps is None else steps
    check(owner, "steps", steps, is_whole(steps, k), f"a whole number of at least k={k}")
    fits = is_whole(basis, least) if basis is not None else True
    check(owner, "basis", basis, fits, f"None, or a whole number of at least {least}, which k={k} needs")
    good = tolerance is None or (is_number(tolerance) and 0 < tolerance < 1)
    check(owner, "tolerance", tolerance, good, "None, or a number between 0 and 1")
    check(owner, "seed", seed, is_whole(seed, 0), "a whole number of at least 0")
    size = max(4 * k + 16, min(SMALL // dimension, steps)) if basis is None else basis
    machine = ThickRestart(lambda v: times(v, 1.0), times.space, k, min(size, dimension), seed, owner)
    ritz = machine.run(steps, lambda: tolerance or _tolerance(times))
    values, residuals = ritz.values.clone(), ritz.residuals.clone()
    if times.way == "differences":
        ends = {*range(k), *range(len(values) - k, len(values))}
        for i in ends:
            values[i], residuals[i] = _corrected(times, machine.vector(ritz, i))
    # Rounding of products, and of the basis in each restart.
    rounding = 32 * max(torch.finfo(p.dtype).eps for p in times.space.params) * (1 + machine.restarts) ** 0.5
    high, low = values[-k:].sort(descending=True).values, values[:k].sort().values
    bounds = [float(part.norm()) + rounding * machine.scale for part in (residuals[-k:], residuals[:k])]
    if not machine.complete:
        bounds = [bound + abs(float(end[0] - end[-1])) for bound, end in zip(bounds, (high, low), strict=True)]
    return Extremes(high, low, torch.tensor(bounds, dtype=torch.float64, device="cpu")[:, None].expand(2, k).clone())


def _tolerance(times: Multiplier) -> float:
    double = times.space.dtype == torch.float64
    if times.way == "autograd":
        return 1e-9 if double else 1e-4
    return 1e-8 if double else 5e-4


def _corrected(times: Multiplier, u: Tensor) -> tuple[float, float]:
    """The Rayleigh quotient of a unit vector, and the norm of its residual, to the fourth order of the step."""
    once, twice = times(u, 1.0, 2.0), times(u, 1.0, 4.0)
    product = once.mul_(4).sub_(twice).div_(3)
    value = float(times.space.dots(product[None], u)[0])
    return value, times.space.norm(product.sub_(u, alpha=value))
