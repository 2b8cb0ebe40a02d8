"""Prodigy: Adam that estimates its step size.  Mishchenko & Defazio 2023, arXiv:2306.06101, Algorithm 4.

As the authors' program 1.1.2. Old d makes the step and all slots; new d scales eps alone. The growth from d0 is not
limited. Differences: bias corrections use the step counter of each tensor; a step without any gradient but zeros is
counted, and decays; groups of learning rate 0 stand still, which the authors' program decays; p0 is a whole copy, where
theirs keeps one 0 for a tensor of zeros; and `slice_p`, whose estimate depends on the number of ranks, is left out.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    Options,
    Slot,
    Slots,
    Value,
    ema,
    penalized,
    sqrt,
    stepped,
    total,
)
from lightning_optim.language.distance import LETTERS, Distance, distance, refuse_groups, sum_decay, sum_weight


class Prodigy(Optimizer):
    """Adam that finds its step size: keep lr at 1, and d grows to the distance between start and solution.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·dₜ₋₁·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·dₜ₋₁²·gₜ²
        sₜ = √β₂·sₜ₋₁ + dₜ₋₁²·η·gₜ / d₀
        N̄ₜ = √β₂·Nₜ₋₁ + sumₐₗₗ(dₜ₋₁²·η·gₜ·(θ₀ − θₜ₋₁) / d₀)
        d̂ₜ = κ·N̄ₜ / sumₐₗₗ(|sₜ|)
        d̄ₜ = max(Dₜ₋₁, d̂ₜ)
        dₜ = d̄ₜ if 10³⁰ − |d̂ₜ| > 0 else dₜ₋₁
        Dₜ = d̄ₜ if 10³⁰ − |d̂ₜ| > 0 else Dₜ₋₁
        Nₜ = N̄ₜ if 10³⁰ − |d̂ₜ| > 0 else Nₜ₋₁
        θₜ = θₜ₋₁·(1 − dₜ₋₁·η·λ) − dₜ₋₁·η·mₜ / (√vₜ + dₜ·ε)
        with η = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay, d₀ = d0, κ = d_coef;
             at the start D₀ = d₀;
             θ₀ is the parameter before its first step

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Factor on the step size that is found, for schedules: 1, and the same in all parameter groups or 0 in some,
            whose parameters stand still.
        betas: Decay rates of the first moment and of the second, each in [0, 1), one pair for all groups.
        beta3: Decay rate of the two sums that estimate d, in [0, 1); null takes the root of the second beta.
        eps: Added to the denominator, times d.
        weight_decay: Times the step size, the share of itself that a parameter loses in a step, or an L2 penalty.
        decoupled: False adds `weight_decay` times the parameter to the gradient, as an L2 penalty, instead.
        use_bias_correction: Correct both moments for their start at zero. It slows down the growth of d.
        safeguard_warmup: Leave lr out of the denominator of the estimate, so that a warm-up does not make d too large.
        d0: The first d, far below any good step size.
        d_coef: Factor on the estimate of d: 0.5 halves the step size, 2 doubles it.
        growth_rate: The largest factor by which d grows in a step, at least 1; 1.02 makes a warm-up, and null, as
            infinity, sets no limit.

    Raises:
        OptionError: for groups whose learning rates are neither the largest nor 0, also where a schedule has made them
            differ, and for groups that differ in betas, beta3, d0, d_coef or growth_rate.

    Note:
        Coming from AdamW set lr=1 and keep its schedule and weight_decay. If steps are too long or too short change
        d_coef, not lr. With a warm-up set safeguard_warmup=True; leave it and use_bias_correction off in runs of a few
        hundred steps, where d would stay too small. Logs of the learning rate show 1: the step size is lr times d, and
        `optimizer.param_groups[0]["d"]` holds d after the first step. Four slots, twice AdamW's memory.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Prodigy(layer.parameters(), lr=1.0)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     layer(torch.ones(1, 2)).square().sum().backward()
        ...     optimizer.step()
        >>> float(optimizer.param_groups[0]["d"]) > 1e-6
        True
    """

    title = "Prodigy"
    paper = "Mishchenko & Defazio 2023, arXiv:2306.06101"
    advice = "Keep lr at 1 and AdamW's schedule and weight decay; change d_coef if steps are too long or too short."
    batch_scaling = None  # the step size follows the gradients of the larger batch by itself
    lr_from_adamw = None
    letters: ClassVar[dict[str, str]] = {"lr": "η", "beta3": "β₃", **LETTERS}
    ranges: ClassVar[dict[str, Any]] = {"beta3": "[0, 1)", "d0": "> 0", "d_coef": "> 0", "growth_rate": "[1, inf]"}

    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float | None = None

    exp_avg = Slot("m", root_of="exp_avg_sq", mean_of="d times the gradient")
    exp_avg_sq = Slot("v", signed=False, second_moment_by="betas.1", mean_of="d times the gradient")
    s = Slot("s", exact=True)  # its sum is the denominator of d
    p0 = Slot("θ₀", exact=True, copies=True)
    d = Slot("d", signed=False, per="optimizer", init=lambda h: h.d0)
    d_max = Slot("D", signed=False, per="optimizer", init=lambda h: h.d0)
    d_numerator = Slot("N", per="optimizer")

    @classmethod
    def check_groups(cls, groups: list[dict[str, Any]]) -> None:
        refuse_groups(cls.__name__, groups, ("betas", "beta3", "d0", "d_coef", "growth_rate"))

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"correction": sqrt(1 - b2**t) / (1 - b1**t) if h.use_bias_correction else 1.0}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        b3 = sum_decay(h)
        d, rate = s.d, s.d * h.lr * h.correction
        raw, g = g, penalized(p, g, h, h.decoupled)
        s.exp_avg = m = ema(s.exp_avg, d * g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, d * d * g * g, b2)
        s.s = b3 * s.s + d / h.d0 * sum_weight(d, rate, h) * g
        progress = b3 * s.d_numerator + total(d / h.d0 * rate * g * (s.p0 - p), over="all")
        found = distance(Distance(d, s.d_max, s.d_numerator), progress, total(abs(s.s), over="all"), h)
        s.d, s.d_max, s.d_numerator = found
        return stepped(p, rate * m / (sqrt(v) + found.d * h.eps), raw, h, h.decoupled, share=rate * h.weight_decay)
