"""SOAP: Adam in the eigenbases of Shampoo's factors.  Vyas et al. 2024, arXiv:2409.11321, Algorithm 3.

What is computed is the authors' program: the first gradient only sets up the bases, the weight decay acts after the
step on the moved parameter, and every tensor counts its own steps. Three things are done otherwise, with the same
result: the first moment is kept in the original basis, columns of a basis keep their places when it is renewed (so the
second moment need not be permuted), and the signs of columns are fixed. One makes results reproducible where theirs
depend on the last bit: directions in which a factor is zero are completed from unit vectors, and keep.
"""

from typing import Any, ClassVar, Literal

import torch

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    MOST_AXES,
    Operand,
    Options,
    Slot,
    Slots,
    Value,
    View,
    adam_in_eigenbases,
    axes_with_bases,
    cautious,
    decays,
    ema,
    first_bases,
    given,
    is_multiple,
    served_axes,
    sqrt,
    where,
    whole,
)

AXES = range(MOST_AXES)


class SOAP(Optimizer):
    """Adam in the eigenbases of running means of g·gᵀ and gᵀ·g, which turn slowly, for every matrix.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        θₜ = (θₜ₋₁ − α·√(1 − β₂ᵗ⁻¹)·AdamInEigenbases(gₜ, mₜ) / (1 − β₁ᵗ⁻¹))·(1 − α·λ)
        with α = lr, β₁, β₂ = betas, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean square of the gradient in
            the eigenbases), each in [0, 1).
        shampoo_beta: Decay rate of the factors g·gᵀ and gᵀ·g; null takes that of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay: after each step the moved parameter loses the share `lr * weight_decay`
            of itself.
        frequency: The eigenbases are renewed at every step of this number.
        max_precond_dim: An axis longer than this is not turned.
        view: "matrix" takes a tensor of more than two axes as a matrix (outputs, all the rest). "axes" turns each
            of its axes, up to five.
        merge_dims: Turn the tensor's own axes, as view="axes" does, with neighbours multiplied while the product is
            at most `max_precond_dim`. A matrix that fits becomes one axis.
        precondition_1d: Turn tensors of one axis too.
        correct_bias: Correct both moments for their start at zero.

    Raises:
        OptionError: for a tensor of more than five axes under view="axes".

    Note:
        In the bases, with G = Q₀ᵀ·gₜ·Q₁ and M = Q₀ᵀ·mₜ·Q₁, the second moment is v = β₂·v + (1 − β₂)·G², and
        AdamInEigenbases(gₜ, mₜ) = Q₀·(M / (√v + ε))·Q₁ᵀ. The first gradient sets up the factors, L₀ from g·gᵀ and L₁
        from gᵀ·g, and their eigenvectors Q₀ and Q₁, and moves nothing. Later steps add to the factors, and every
        `frequency`-th one replaces Q by the QR decomposition of L·Q. Tensors of one axis take Adam's direction.
        Coming from AdamW keep its learning rate or take up to 3 times it, and compare after some hundred steps:
        betas of 0.95 and the skipped step are slow to start. State is that of Adam and 2 (m² + n²) numbers more
        for a matrix of m rows and n columns; a step costs 8 m n (m + n) products. Under state_bits=8 the first
        moment has 8 bits, and what belongs to a matrix stays exact. Real parameters only.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = SOAP(layer.parameters())
        >>> for _ in range(2):
        ...     layer(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq', 'factor_0', 'factor_1', 'basis_0', 'basis_1']
    """

    title = "SOAP"
    paper = "Vyas et al. 2024, arXiv:2409.11321"
    advice = "Keep AdamW's learning rate or take up to 3 times it; compare after some hundred steps, not earlier."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    letters: ClassVar[dict[str, str]] = {"shampoo_beta": "β₃"}
    ranges: ClassVar[dict[str, Any]] = {"shampoo_beta": "[0, 1)", "frequency": ">= 1", "max_precond_dim": ">= 1"}
    real_only = "its eigenbases are real. Give it to Adam."

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.01
    frequency: int = 10
    max_precond_dim: int = 10000
    view: Literal["matrix", "axes"] = "matrix"
    merge_dims: bool = False
    precondition_1d: bool = False
    correct_bias: bool = True

    exp_avg = Slot("m")
    exp_avg_sq = Slot("v", signed=False, per="matrix", shape=("rows", "columns"), mean_of="rotated gradient")
    factor_0, factor_1, factor_2, factor_3, factor_4 = (Slot(f"L{i}", per="matrix", shape=(i, i)) for i in AXES)
    basis_0, basis_1, basis_2, basis_3, basis_4 = (Slot(f"Q{i}", per="matrix", shape=(i, i)) for i in AXES)

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        longest = int(h.max_precond_dim)
        return served_axes(shape, longest, h.view == "axes", bool(h.merge_dims), bool(h.precondition_1d))

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        axes = axes_with_bases(SOAP.matrices(h, shape), int(h.max_precond_dim))
        names = [f"{word}_{axis}" for axis in axes for word in ("factor", "basis")]
        return {"of_matrix": ("exp_avg_sq", *names) if names else ()}

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        j = t - 1  # the steps that have moved the tensor, this one included
        beta = h.shampoo_beta if given(h.shampoo_beta) else b2
        correct = {"c1": 1 - b1**j, "c2": 1 - b2**j} if h.correct_bias else {"c1": 1.0, "c2": 1.0}
        return {"first": t == 1, "renew": is_multiple(j, h.frequency), "beta3": beta, **correct}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        if h.first:
            if h.of_matrix:
                whole(first_bases, g, s=s, slots=h.of_matrix, shampoo_beta=h.beta3)
            return p
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        if h.of_matrix:
            settings = {"renew": h.renew, "beta2": b2, "eps": h.eps, "shampoo_beta": h.beta3}
            u = whole(adam_in_eigenbases, g, m, s=s, slots=h.of_matrix, **settings)
        else:
            s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
            u = m / (sqrt(v) + h.eps)
        step = h.lr * sqrt(h.c2) / h.c1 * u
        moved = p - cautious(step, g, h)
        return where(decays(p, step, h), moved * (1 - h.lr * h.weight_decay), moved)
