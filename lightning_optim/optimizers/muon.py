"""Muon: orthogonalized momentum for matrices, AdamW for everything else.  Jordan et al. 2024 (KellerJordan/Muon).

The default factor is Moonlight's (Liu et al. 2025, arXiv:2502.16982), the default polynomials are those of Polar
Express (Amsel et al. 2025, arXiv:2505.16932), divided by 1.01 in each step. Deviations from Jordan's program: the norm
has a floor and no summand; the factor of a convolution is that of its matrix (outputs, all the rest) and not of its
kernel; a tensor without a gradient is left alone.
"""

from typing import Any, ClassVar, Literal

import torch

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    OptionError,
    Options,
    Slot,
    Slots,
    Value,
    View,
    adam_step,
    ema,
    given,
    matrix_view,
    orthogonalize,
    stepped,
)


class Muon(Optimizer):
    """Muon moves a matrix by the nearest matrix with orthogonal rows or columns to its mean gradient.

    Embeddings, the head, norms, biases and vectors get AdamW: by their role in the module that `create_optimizer` or
    `ConfiguredOptimizer` is given, or by `matrix` in a parameter group. With parameters alone shapes decide.

    Formula:
        mₜ = μ·mₜ₋₁ + (1 − μ)·gₜ
        θₜ = θₜ₋₁·(1 − α·λ) − α·NewtonSchulz(μ·mₜ + (1 − μ)·gₜ)
        with α = lr, μ = momentum, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size, for AdamW times `adamw_scale`.
        momentum: Decay rate of the mean gradient of a matrix.
        nesterov: Orthogonalize the mean of this gradient and the mean gradient, weighed by `momentum`.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        adjust: The factor on the orthogonal matrix of m rows and n columns: "match_rms_adamw" is 0.2√max(m, n), with
            which the learning rates of AdamW serve; "original" √max(1, m/n) as in torch; "spectral" √(m/n); "none" 1.
        coefficients: The polynomials of the Newton-Schulz iteration: "polar_express", "classic" as in torch, or
            "quintic".
        steps: The number of iterations.
        eps: A floor under the norm by which a matrix is divided first.
        compute: The dtype of matrix products: "float32", "bfloat16", or "auto", which is bfloat16 on GPUs, float32 on
            CPUs, and float64 for parameters in float64.
        adamw_scale: The learning rate of AdamW relative to `lr`.
        betas: Decay rates of AdamW's moments, each in [0, 1).
        adamw_eps: Added to AdamW's denominator.
        normalize_rows: Divide the rows of the orthogonal matrix by the root of their mean squares over time (NorMuon),
            at the same norm.
        beta2: Decay rate of these mean squares.
        matrix: True for Muon and false for AdamW, whatever the role; null lets role and shape decide.
        blocks: The rows fall into this number of equal matrices, or into matrices of these numbers of rows.
        heads: The same as `blocks`, for a number of attention heads.
        experts: The first of three axes counts matrices.

    Raises:
        OptionError: for blocks that do not divide the rows of a matrix, for matrix=True on a tensor of fewer than two
            axes, for cautious=True, and if no parameter is a matrix.

    Note:
        In runs of some hundred steps begin with 3 times AdamW's learning rate, for a step of Muon has an RMS of
        0.2 lr, and AdamW's first steps one of nearly lr; in long runs with AdamW's. `repr` of the optimizer tells which
        parameter got what, and why. Checkpoints of `torch.optim.Muon` load.

    Example:
        >>> import torch
        >>> from lightning_optim import create_optimizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> optimizer = create_optimizer("muon", model, lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> [list(optimizer.state[layer.weight]) for layer in model]
        [['step', 'exp_avg'], ['step', 'exp_avg', 'exp_avg_sq']]
    """

    title = "Muon"
    paper = "Jordan et al. 2024, github.com/KellerJordan/Muon"
    advice = "3 times AdamW's rate in runs of some hundred steps, AdamW's rate in long ones; the same weight decay."
    batch_scaling = "sqrt"
    lr_from_adamw = 3.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 2e-2}
    ranges: ClassVar[dict[str, Any]] = {
        **{"beta2": "[0, 1)", "adamw_scale": "> 0", "adamw_eps": ">= 0"},
        **{"steps": ">= 1", "blocks": ">= 1", "heads": ">= 1"},
    }
    letters: ClassVar[dict[str, str]] = {"rate": "η", "adamw_scale": "σ", "adamw_eps": "ε"}
    real_only = "the iteration is for real matrices."
    refuses: ClassVar[dict[str, str]] = {"cautious": "its step is orthogonal, and not without some elements"}
    matrix_options = ("matrix", "blocks", "heads", "experts")

    lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    adjust: Literal["match_rms_adamw", "original", "spectral", "none"] = "match_rms_adamw"
    coefficients: Literal["polar_express", "classic", "quintic"] = "polar_express"
    steps: int = 5
    eps: float = 1e-12
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    adamw_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    adamw_eps: float = 1e-8
    normalize_rows: bool = False
    beta2: float = 0.95
    matrix: bool | None = None
    blocks: int | tuple[int, ...] | None = None
    heads: int | None = None
    experts: bool = False

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    row_var = Slot("r", signed=False, per="matrix", shape=("rows",))

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["blocks"] is not None and options["heads"] is not None:
            raise OptionError(f"{cls.__name__}: heads={options['heads']} is another word for blocks; give one of them.")

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        if given(h.matrix) and not h.matrix:
            return None
        word = "heads" if given(h.heads) else "blocks"
        found = matrix_view(shape, getattr(h, word) or 1, bool(h.experts) and len(shape) > 1, word)
        if h.matrix and found is None:
            raise OptionError(f"matrix=True, but a tensor of shape {[*shape]} has fewer than two axes.")
        least = 1 if h.matrix else 2
        return found if found and min(*found.rows, found.columns) >= least else None

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"rule": "adamw" if Muon.matrices(h, shape) is None else "muon"}

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"c1": 1 - b1**t, "c2": 1 - b2**t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        if h.rule == "adamw":
            b1, b2 = h.betas
            rate = h.lr * h.adamw_scale
            s.exp_avg = m = ema(s.exp_avg, g, b1)
            s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
            return stepped(p, adam_step(rate, m, v, h, h.adamw_eps), g, h, share=rate * h.weight_decay)
        s.exp_avg = m = ema(s.exp_avg, g, h.momentum)
        u = ema(m, g, h.momentum)
        slots = s if h.normalize_rows else None
        x = u if h.nesterov else m
        o = orthogonalize(x, h.coefficients, h.steps, h.eps, h.compute, h.adjust, slots, h.beta2)
        return stepped(p, h.lr * o, g, h)
