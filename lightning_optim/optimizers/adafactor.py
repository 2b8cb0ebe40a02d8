"""Adafactor: second moments of rows and columns.  Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5.

mode="torch" equals `torch.optim.Adafactor`, in which eps1 is a floor and is not added to the squared gradient.
One difference: where eps1 is not given, each tensor takes the one of its own type. mode="paper" adds eps1, has
the paper's step sizes and momentum, and scales the decay like the step, as transformers does. In both modes lr
is the upper bound of the step size, for which the paper has 0.01.
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
    ema,
    factored_axes,
    given,
    maximum,
    mean,
    minimum,
    rms,
    sqrt,
    stepped,
)

LARGEST_STEP = 1e-2  # the paper's bound of the relative step size: rho = min(1e-2, 1 / sqrt(t)), section 9
WARMUP = 1e-6  # with warm-up the bound is 1e-6 t instead
EPS1 = 1e-30  # the paper's epsilon 1, section 8
TINY = 2.0**-126  # the smallest number that float32 holds in full


class Adafactor(Optimizer):
    """Adam without a first moment, with row and column means for the second: next to no state.

    Formula:
        Rₜ = (1 − t^c)·Rₜ₋₁ + t^c·mean(gₜ², columns)
        Cₜ = (1 − t^c)·Cₜ₋₁ + t^c·mean(gₜ², rows)
        Uₜ = gₜ·min(1 / (√(Rₜ / max(mean(Rₜ, rows), ε₁))·√Cₜ), 1 / ε₁)
        θₜ = θₜ₋₁·(1 − η·λ) − min(η, 1 / √t)·max(RMS(θₜ₋₁), ε₂)·Uₜ / max(RMS(Uₜ) / d, 1)
        with η = lr, c = beta2_decay, ε₁, ε₂ = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Upper bound of the step size, which is relative to the root mean square of the tensor; null means
            1e-2.
        beta2_decay: Exponent, at most 0: at step t the second moment decays at rate `1 - t ** beta2_decay`.
        eps: Two small numbers: a floor of the squared gradient's mean (null: the machine epsilon of the
            parameter's type in mode "torch", 1e-30 in mode "paper"), and the smallest root mean square of a
            tensor that steps are scaled by.
        d: Largest root mean square of an update before it is multiplied by the step size; at least 1.
        weight_decay: Share of the parameter, times lr in mode "torch" or times the step size in mode "paper",
            that a step takes away.
        mode: "torch" computes what `torch.optim.Adafactor` does, "paper" what the paper and transformers do.
        relative_step: Let the step size fall as 1 / sqrt(t) once that is below its bound; False keeps lr (mode
            "paper" only).
        scale_parameter: Multiply steps by the root mean square of the tensor (mode "paper" only may switch it
            off).
        warmup_init: Start with the bound 1e-6 * t instead of lr (mode "paper" only).
        beta1: Decay rate of a mean of the updates; null keeps none (mode "paper" only).
        factored: Keep the second moment as row and column means; False keeps it for every element.
        factor_axes: Which two axes count as rows and columns: "last_two", or "two_largest", which saves more
            for convolutions.
        min_dim_size_to_factor: Do not factor a tensor where one of the two axes is shorter than this.

    Raises:
        OptionError: if an option of mode "paper" is given in mode "torch", or `warmup_init` without
            `relative_step`.

    Note:
        Steps are relative to the weights, so AdamW's learning rate does not carry over: start at 1e-2. To
        fine-tune at a rate of your own, set mode="paper", relative_step=False and scale_parameter=False, and
        take AdamW's rate. Real parameters only. Checkpoints of `torch.optim.Adafactor` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = Adafactor(layer.parameters())
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> {name: list(value.shape) for name, value in optimizer.state[layer.weight].items()}
        {'step': [], 'row_var': [2, 1], 'col_var': [1, 3]}
    """

    title = "Adafactor"
    paper = "Shazeer & Stern 2018, arXiv:1804.04235"
    advice = "Start at lr 1e-2: steps are a share of the weights' size, so AdamW's rate does not carry over."
    batch_scaling = "sqrt"
    lr_from_adamw = None
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-2}
    letters: ClassVar[dict[str, str]] = {
        "lr": "η",
        "eps1": "ε₁",
        "beta2_decay": "c",
        "beta1": "β₁",
        "alpha": "α",
        "G2": "G",
        "step": "Û",
    }
    ranges: ClassVar[dict[str, Any]] = {"d": ">= 1"}
    real_only = "row and column means of squares have no complex form. Give it to Adam."

    lr: float | None = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: float = 0.0
    mode: Literal["torch", "paper"] = "torch"
    relative_step: bool = True
    scale_parameter: bool = True
    warmup_init: bool = False
    beta1: float | None = None
    factored: bool = True
    factor_axes: Literal["last_two", "two_largest"] = "last_two"
    min_dim_size_to_factor: int = 0

    row_var = Slot("R", signed=False, exact=True, without="columns")
    col_var = Slot("C", signed=False, exact=True, without="rows")
    variance = Slot("V", signed=False)  # of tensors that are not factored
    exp_avg = Slot("m", mean_of="step")

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        options["lr"] = LARGEST_STEP if options["lr"] is None else options["lr"]
        only_paper = {"relative_step": True, "scale_parameter": True, "warmup_init": False, "beta1": None}
        changed = [f"{name}={options[name]!r}" for name, default in only_paper.items() if options[name] != default]
        if options["mode"] == "torch" and changed:
            raise OptionError(f"{cls.__name__}: {changed[0]} needs mode='paper'.")
        if options["warmup_init"] and not options["relative_step"]:
            raise OptionError(f"{cls.__name__}: warmup_init=True needs relative_step=True.")

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        rows, columns = factored_axes(shape, h.factor_axes == "two_largest", int(h.min_dim_size_to_factor))
        eps1 = h.eps[0] if given(h.eps[0]) else torch.finfo(dtype).eps if h.mode == "torch" else EPS1
        return {"factored": h.factored and rows is not None, "rows": rows, "columns": columns, "eps1": eps1}

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        largest = WARMUP * t if h.warmup_init else h.lr
        return {"rho": minimum(largest, t**-0.5) if h.relative_step else h.lr, "b2": 1 - t**h.beta2_decay}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        return update_of_torch(p, g, s, h) if h.mode == "torch" else update_of_paper(p, g, s, h)


def update_of_torch(p: Value, g: Value, s: Slots, h: Options) -> Value:
    """What `torch.optim.Adafactor` does: eps1 is a floor, and lr scales the decay."""
    alpha = h.rho * maximum(rms(p), h.eps[1])
    if h.factored:
        s.row_var = R = ema(s.row_var, mean(g * g, h.columns), h.b2)
        s.col_var = C = ema(s.col_var, mean(g * g, h.rows), h.b2)
        U = g * over_roots(R / maximum(mean(R, h.rows), h.eps1), C, h.eps1)
    else:
        s.variance = V = ema(s.variance, g * g, h.b2)
        U = g / sqrt(maximum(V, h.eps1 * h.eps1))
    step = alpha / maximum(rms(U) / h.d, 1.0) * U
    return stepped(p, step, g, h)


def update_of_paper(p: Value, g: Value, s: Slots, h: Options) -> Value:
    """Algorithm 4, or 5 where the tensor is not factored; with a mean of the updates and a decay by the step size."""
    alpha = h.rho * maximum(rms(p), h.eps[1]) if h.scale_parameter else h.rho
    G2 = g * g + h.eps1
    if h.factored:
        s.row_var = R = ema(s.row_var, mean(G2, h.columns), h.b2)
        s.col_var = C = ema(s.col_var, mean(G2, h.rows), h.b2)
        U = g * over_roots(R / mean(R, h.rows), C, TINY**0.5)  # after a gradient of 1e15 R / mean(R) may underflow
    else:
        s.variance = V = ema(s.variance, G2, h.b2)
        U = g / sqrt(V)
    step = alpha / maximum(rms(U) / h.d, 1.0) * U
    if given(h.beta1):
        s.exp_avg = step = ema(s.exp_avg, step, h.beta1)
    return stepped(p, step, g, h, share=h.weight_decay * alpha)


def over_roots(rows: Value, columns: Value, least: Operand) -> Value:
    """1 / sqrt(rows * columns), the root being `least` at least. The product may underflow, so roots come first."""
    return minimum(1 / sqrt(rows) * (1 / sqrt(columns)), 1 / least)
