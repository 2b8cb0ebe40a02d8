"""Orthogonalize: the nearest matrix with orthogonal rows or columns, by Newton-Schulz iteration.

Jordan et al. 2024 (KellerJordan/Muon). An iteration X <- a X + b (X X') X + c (X X')^2 X maps every singular value s to
a s + b s^3 + c s^5 and leaves the singular vectors alone. It needs the whole matrix, so it is a cut of the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lightning_optim.language.math import is_evaluating
from lightning_optim.language.matrices import rounded, whole
from lightning_optim.language.values import Operand, Setting, Slots, Value

Coefficients = Literal["polar_express", "classic", "quintic"]
Compute = Literal["auto", "float32", "bfloat16"]
Adjust = Literal["match_rms_adamw", "original", "spectral", "none"]
Triple = tuple[float, float, float]

CLASSIC: Triple = (3.4445, -4.7750, 2.0315)
QUINTIC: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Amsel et al. 2025, arXiv:2505.16932: the best polynomial in each step, from singular values of 1e-3 on. The test of
# this table computes it. The last entry repeats.
POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Rounding lifts a singular value of 1 above 1, where the bare table explodes. Each step first divides by this.
SAFETY = 1.01
STEPS_OF_A_GRAM = 3  # after which the Gram matrix is computed again


def polynomials(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The coefficients (a, b, c) of each step."""
    if coefficients == "classic":
        return (CLASSIC,) * steps
    if coefficients == "quintic":
        table = QUINTIC
    else:
        table = tuple((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS)
    return tuple(table[min(i, len(table) - 1)] for i in range(steps))


def scale_of(adjust: Adjust, rows: int, columns: int) -> float:
    """The factor f(rows, columns) on an orthogonal matrix, whose elements have an RMS of 1 / sqrt(max(rows, columns)).

    Args:
        adjust: "original" is sqrt(max(1, rows / columns)) of Keller Jordan and torch; "match_rms_adamw" 0.2 sqrt(max(
            rows, columns)) of Moonlight, an RMS of 0.2 for every shape; "spectral" sqrt(rows / columns); "none" 1.
        rows: The number of rows.
        columns: The number of columns.
    """
    if adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if adjust == "spectral" else 1.0


def products_dtype(
    dtype: torch.dtype, device: torch.device, compute: Compute = "auto", **settings: object
) -> torch.dtype:
    """The dtype of the products: what `compute` says; for "auto" float64 of float64, bfloat16 on GPUs, else float32."""
    if compute != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[compute]
    if dtype == torch.float64:
        return dtype
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@rounded(products_dtype)
def newton_schulz(
    x: Tensor,
    coefficients: Coefficients = "polar_express",
    steps: int = 5,
    eps: float = 1e-12,
    compute: Compute = "auto",
    adjust: Adjust = "none",
) -> Tensor:
    """Orthogonalize each matrix of a batch.

    Args:
        x: Matrices (k, rows, columns). They are not changed.
        coefficients: The polynomials.
        steps: The number of iterations.
        eps: A floor under the norm by which a matrix is divided first. A matrix of zeros stays zero.
        compute: The dtype of the products, see `orthogonalize`.
        adjust: The factor on the result, see `scale_of`.

    Returns:
        A new batch in the dtype of the products.
    """
    rows, columns = x.shape[-2:]
    dtype = products_dtype(x.dtype, x.device, compute)
    values = x.detach().to(dtype)
    if not x.numel():
        return values.clone()
    exact = torch.promote_types(dtype, torch.float32)  # the norm is that of the rounded values
    norm = torch.linalg.vector_norm(values, dim=-1, dtype=exact).double().square().sum(-1).sqrt().clamp_min(eps)
    y = torch.div(values, norm.to(exact)[:, None, None], out=torch.empty_like(values))
    iterated = _by_grams if max(rows, columns) >= 2 * min(rows, columns) else _iterated
    return iterated(y, polynomials(coefficients, steps), scale_of(adjust, rows, columns))


@rounded(products_dtype)
def even_rows(
    x: Tensor, slots: dict[str, Tensor], beta2: float, adjust: Adjust = "none", **settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Orthogonalize each matrix of a batch, and divide its rows by the root of their mean squares over time (NorMuon).

    Li et al. 2025, arXiv:2510.05491. The norm of a matrix stays.

    Args:
        x: Matrices (k, rows, columns).
        slots: `row_var`, the mean squares, (k, rows).
        beta2: Their decay rate.
        adjust: The factor on the result.
        settings: As those of `newton_schulz`.

    Returns:
        The new batch, and the new mean squares.
    """
    found = newton_schulz(x, **settings)
    exact, before = found.to(torch.promote_types(found.dtype, torch.float32)), slots["row_var"]
    squares = torch.lerp(before, exact.square().mean(-1).to(before.dtype), 1 - beta2)
    even = exact / (squares.sqrt() + 1e-10).to(exact.dtype)[..., None]
    norm, reached = (torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True) for y in (exact, even))
    even = even * (norm / (reached + 1e-10)) * scale_of(adjust, *x.shape[-2:])
    return even.to(found.dtype), {"row_var": squares}


def _iterated(x: Tensor, of_steps: Sequence[Triple], factor: float) -> Tensor:
    """The iteration on a batch of matrices, times a factor."""
    k, side = len(x), min(x.shape[1:])
    gram, polynomial, other = x.new_empty(k, side, side), x.new_empty(k, side, side), torch.empty_like(x)
    for i, (a, b, c) in enumerate(of_steps):
        scale = factor if i == len(of_steps) - 1 else 1.0
        torch.baddbmm(_gram(x, gram), gram, gram, beta=b, alpha=c, out=polynomial)
        x, other = _multiplied(x, polynomial, scale * a, scale, other), x
    return x


def _by_grams(x: Tensor, of_steps: Sequence[Triple], factor: float) -> Tensor:
    """The same polynomial of x for fewer operations where one side is short: on the Gram matrix of that side.

    Every step multiplies x by a polynomial of its Gram matrix R. The product of these is formed first, and x multiplied
    by it. In few bits R drifts away from that of x, so it is computed again after `STEPS_OF_A_GRAM` steps; with one
    step more, singular values of a matrix of low rank exceed those of `_iterated` in bfloat16.
    """
    other = torch.empty_like(x)
    for low in range(0, len(of_steps), STEPS_OF_A_GRAM):
        first, *others = of_steps[low : low + STEPS_OF_A_GRAM]
        gram = _gram(x)
        product = multiplier = _multiplier(gram, first)
        for triple in others:
            gram = torch.bmm(torch.bmm(multiplier, gram), multiplier)
            multiplier = _multiplier(gram, triple)
            product = torch.bmm(product, multiplier)
        last = low + STEPS_OF_A_GRAM >= len(of_steps)
        x, other = _multiplied(x, product, 0.0, factor if last else 1.0, other), x
    return x


def _gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The products of the shorter side: of rows with rows, or of columns with columns."""
    return torch.bmm(x.mT, x, out=out) if x.shape[1] > x.shape[2] else torch.bmm(x, x.mT, out=out)


def _multiplied(x: Tensor, polynomial: Tensor, a: float, scale: float, out: Tensor) -> Tensor:
    """a x, and scale times the product of x and a polynomial of its Gram matrix, from the shorter side of x."""
    factors = (x, polynomial) if x.shape[1] > x.shape[2] else (polynomial, x)
    return torch.baddbmm(x, *factors, beta=a, alpha=scale, out=out)


def _multiplier(gram: Tensor, triple: Triple) -> Tensor:
    """a I + b R + c R² of Gram matrices R."""
    a, b, c = triple
    found = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    found.diagonal(dim1=1, dim2=2).add_(a)
    return found


def orthogonalize(
    x: Operand,
    coefficients: Coefficients | Setting = "polar_express",
    steps: int | Setting = 5,
    eps: Operand = 1e-12,
    compute: Compute | Setting = "auto",
    adjust: Adjust | Setting = "none",
    s: Slots | None = None,
    beta2: Operand = 0.95,
) -> Value:
    """The matrices U V' of the singular value decompositions U S V', approximately: singular values near 1.

    Args:
        x: A value per element of a tensor, which `Definition.matrices` makes matrices. Outside an update a matrix, or
            a batch of them (k, rows, columns).
        coefficients: "polar_express" (Amsel et al. 2025), "classic" (Jordan et al. 2024: singular values end between
            0.68 and 1.13), or "quintic" (You Jiacheng).
        steps: The number of iterations.
        eps: A floor under the Frobenius norm, by which a matrix is divided first.
        compute: The dtype of the products: "float32", "bfloat16", or "auto": float64 where x is float64, bfloat16 on
            GPUs, else float32.
        adjust: A factor on the result that depends on the shape, see `scale_of`.
        s: The slots of the update, to make the rows even by their mean squares in the slot `row_var` (`even_rows`).
        beta2: The decay rate of that slot.

    Example:
        >>> u = orthogonalize(torch.tensor([[3.0, 0.0], [0.0, 0.5]]), steps=8)
        >>> u.round(decimals=3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    given: dict[str, Any] = {"coefficients": coefficients, "steps": steps, "eps": eps}
    given |= {"compute": compute, "adjust": adjust}
    tensor: Any = x
    if isinstance(tensor, Tensor) and not is_evaluating():
        batch = tensor if tensor.dim() > 2 else tensor[None]
        return cast(Value, newton_schulz(batch, **given).reshape(tensor.shape))
    return whole(newton_schulz, x, **given) if s is None else _even(x, s, beta2, given)


def _even(x: Operand, s: Slots, beta2: Operand, given: dict[str, Any]) -> Value:
    return whole(even_rows, x, s=s, slots=("row_var",), beta2=beta2, **given)
