"""Adam in slowly moving eigenbases (SOAP): the arithmetic on whole matrices.

A tensor has for each served axis a factor (the running mean of the gradient's products with itself along that axis) and
a basis (its eigenvectors, in columns). All functions work on batches: axis 0 counts tensors of one shape.

The basis of a factor without full rank is not unique, and what LAPACK returns depends on the last bit of the gradient.
So null directions are completed from unit vectors, and keep their old direction in later steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_optim.errors import OptionError
from lightning_optim.language.values import Operand, Value
from lightning_optim.language.view import View

MOST_AXES = 5  # of a tensor, as of the weight of a convolution over volumes
NULL = 4.0  # times side and machine epsilon: eigenvalues up to this share of the largest count as zero
DEPENDENT = 32.0  # the same for a column that depends on those before it

Matrices = dict[str, Tensor]


# ------------------------------------------------------------------ which axes


def served_axes(shape: torch.Size, longest: int, own_axes: bool, merge: bool, vectors: bool) -> View | None:
    """The axes of a tensor that may have a basis, as a view of one matrix with axes.

    Args:
        shape: The logical shape of the tensor.
        longest: Longer axes have no basis.
        own_axes: Each axis of the tensor has a basis; otherwise two, of (outputs, all the rest).
        merge: Multiply neighbouring axes while the product is at most `longest`.
        vectors: Serve tensors of one axis too.

    Returns:
        The view, or None where no axis has a basis.

    Raises:
        OptionError: for more than five axes.

    Example:
        >>> served_axes(torch.Size([6, 4, 3, 3]), 100, own_axes=False, merge=False, vectors=False)
        View(rows=(6,), columns=36, axes=())
        >>> served_axes(torch.Size([6, 4, 3, 3]), 36, own_axes=True, merge=True, vectors=False)
        View(rows=(24,), columns=9, axes=())
    """
    if not shape.numel() or not (len(shape) > 1 or (vectors and len(shape) == 1)):
        return None
    axes = list(shape) if own_axes or merge or len(shape) == 1 else [shape[0], shape[1:].numel()]
    axes = merged(axes, longest) if merge else axes
    axes = axes if len(axes) > 1 else [*axes, 1]
    if len(axes) > MOST_AXES:
        do = "Set view='matrix', which takes all axes but the first together, or merge_dims=True."
        raise OptionError(
            f"a tensor of shape {[*shape]} has {len(axes)} axes{' after merging' if merge else ''}, and bases are kept "
            f"for {MOST_AXES} at most. {'Raise max_precond_dim, or leave out merge_dims.' if merge else do}"
        )
    view = View((axes[0],), torch.Size(axes[1:]).numel(), tuple(axes[1:]) if len(axes) > 2 else ())
    return view if axes_with_bases(view, longest) else None


def merged(axes: list[int], longest: int) -> list[int]:
    """Axes with neighbours multiplied, from the left, while the product is at most `longest`."""
    found: list[int] = []
    product = 1
    for axis in axes:
        if product * axis > longest and product > 1:
            found.append(product)
            product = 1
        product *= axis
    return [*found, product] if product > 1 or not found else found


def axes_with_bases(view: View | None, longest: int) -> tuple[int, ...]:
    """The axes that have a basis. Along an axis of one element there is nothing to turn."""
    sizes = () if view is None else view.shape(0)
    return tuple(axis for axis, size in enumerate(sizes) if 1 < size <= longest)


def is_multiple(t: Operand, n: Any) -> bool:
    """Whether a step counter is a multiple of n. It is where the formula is printed."""
    counter: Any = t
    return isinstance(t, Value) or counter % n == 0


# ------------------------------------------------------------------ a step


def first_bases(g: Tensor, slots: Matrices, *, shampoo_beta: float) -> tuple[Tensor, Matrices]:
    """Factors and bases after the first gradient, which moves nothing."""
    new: Matrices = {}
    for axis in _axes(slots):
        new[f"factor_{axis}"] = factor = (1 - shampoo_beta) * _products(g, axis)
        new[f"basis_{axis}"] = torch.stack([_first_basis(one) for one in factor])
    return g, new


def adam_in_eigenbases(
    g: Tensor, m: Tensor, slots: Matrices, *, renew: bool, beta2: float, eps: float, shampoo_beta: float
) -> tuple[Tensor, Matrices]:
    """The direction m / (√v + ε), taken in the bases and turned back, and the new second moment, factors and bases.

    Args:
        g: The gradient, (k, *axes).
        m: The first moment, in the original basis.
        slots: The second moment, in the bases, and of each served axis the factor and the basis.
        renew: Turn the bases by a step of orthogonal iteration afterwards.
        beta2: The decay of the second moment.
        eps: Added to the root.
        shampoo_beta: The decay of the factors.
    """
    new: Matrices = {}
    bases = {axis: slots[f"basis_{axis}"] for axis in _axes(slots)}
    v = torch.lerp(slots["exp_avg_sq"].view(g.shape), turned(g, bases).square(), 1 - beta2)
    new["exp_avg_sq"] = v.reshape(slots["exp_avg_sq"].shape)
    u = turned(turned(m, bases) / (v.sqrt() + eps), {axis: basis.mT for axis, basis in bases.items()})
    for axis, basis in bases.items():
        new[f"factor_{axis}"] = factor = torch.lerp(slots[f"factor_{axis}"], _products(g, axis), 1 - shampoo_beta)
        if renew:
            new[f"basis_{axis}"] = _renewed(basis, factor)
    return u, new


def _axes(slots: Matrices) -> list[int]:
    return [int(name.removeprefix("factor_")) for name in slots if name.startswith("factor_")]


def _products(g: Tensor, axis: int) -> Tensor:
    """The product of g with itself along one axis, over all others: (k, size, size)."""
    x = g.movedim(axis + 1, -1).flatten(1, -2)
    return x.mT @ x


def turned(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """x with coordinates in the bases (the columns) along their axes."""
    for axis, basis in bases.items():
        moved = x.movedim(axis + 1, -1)
        x = (moved.flatten(1, -2) @ basis).view(moved.shape).movedim(-1, axis + 1)
    return x


# ------------------------------------------------------------------ bases


def _first_basis(factor: Tensor) -> Tensor:
    """The eigenvectors of a factor (n, n), largest eigenvalue first; null directions from unit vectors."""
    n = len(factor)
    unit = torch.eye(n, dtype=factor.dtype, device=factor.device)
    if not bool(factor.isfinite().all()):
        return torch.full_like(factor, torch.nan)  # as every other slot is after such a gradient
    found = _eigenvectors(factor)
    if found is None:
        return unit
    values, vectors = found[0].flip(0), found[1].flip(1)
    rank = int((values > NULL * n * torch.finfo(values.dtype).eps * values[0]).sum())
    return vectors if rank == n else _orthonormal(torch.cat([vectors[:, :rank], unit[:, : n - rank]], 1))[0]


def _eigenvectors(factor: Tensor) -> tuple[Tensor, Tensor] | None:
    for dtype in (factor.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
        except RuntimeError:  # torch.linalg.LinAlgError, where LAPACK does not converge
            continue
        return values.to(factor.dtype), vectors.to(factor.dtype)
    warnings.warn(
        f"The eigenvectors of a factor of {len(factor)} rows could not be computed: its axis keeps the unit vectors "
        "until the bases are renewed.",
        stacklevel=2,
    )
    return None


def _renewed(basis: Tensor, factor: Tensor) -> Tensor:
    """The bases after a step of orthogonal iteration, each column where it was: (k, n, n)."""
    n, eps = basis.shape[-1], torch.finfo(basis.dtype).eps
    image = factor @ basis
    sizes = (basis * image).sum(-2)
    order = sizes.argsort(dim=-1, descending=True, stable=True)[:, None, :].expand_as(basis)
    image, old = image.gather(-1, order), basis.gather(-1, order)
    found, triangle = _orthonormal(image)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    dependent = diagonal <= DEPENDENT * n * eps * triangle.abs().amax((-2, -1))[:, None]
    for i in dependent.any(-1).nonzero().flatten().tolist():
        last = dependent[i].sort(stable=True).indices  # the order in which those that depend on others are last
        columns = torch.where(dependent[i], old[i], image[i])
        found[i][:, last] = _orthonormal(columns[:, last])[0]
    return torch.empty_like(found).scatter_(-1, order, found)


def _orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The decomposition of QR whose triangle has a diagonal that is not negative, which is unique."""
    q, r = torch.linalg.qr(x)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x.dtype)
    return q * signs[..., None, :], r * signs[..., :, None]
