"""AdEMAMix: Adam with a second, slow mean of the gradient.  Pagliardini et al. 2024, arXiv:2409.03137, Algorithm 1.

As the authors' program (apple/ml-ademamix), but for its alpha of 2, where the paper has 5, and for the 1e-8 that it
adds inside the logarithms of the schedule of beta3. pytorch_optimizer has one length for both schedules and, by
default, an L2 penalty.
"""

from typing import Any, ClassVar, Literal

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    OptionError,
    Options,
    Slot,
    Slots,
    Value,
    ema,
    exp,
    given,
    log,
    minimum,
    sqrt,
    stepped,
    where,
)


class AdEMAMix(Optimizer):
    """AdamW that also steps along a mean of many thousand gradients, which old ones still help.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        sₜ = β₃·sₜ₋₁ + (1 − β₃)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        θₜ = θₜ₋₁·(1 − η·λ) − η·(mₜ / (1 − β₁ᵗ) + α·sₜ) / (√(vₜ / (1 − β₂ᵗ)) + ε)
        with η = lr, β₁, β₂, β₃ = betas, α = alpha, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the fast mean of the gradient, of the mean squared gradient and of the slow mean, each in
            [0, 1).
        alpha: Weight of the slow mean, at least 0.
        t_alpha: Number of steps over which alpha grows from 0; "total" is the length of the run, which a Trainer
            with `ConfiguredOptimizer` knows; null is a constant alpha.
        t_beta3: Number of steps over which the half-life of the slow mean grows from that of the fast one, or "total";
            null is a constant decay rate.
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.

    Raises:
        OptionError: for t_beta3 without a slow mean, and in a step for "total" where the length of the run is unknown.

    Note:
        Coming from AdamW keep its learning rate and weight decay, and set t_alpha and t_beta3 to "total": without them
        the slow mean is far behind at the start. It is for runs much longer than 1 / (1 - beta3), which is 10000 steps.
        Three slots, half as much again as AdamW's memory.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdEMAMix(layer.parameters(), lr=1e-3, t_alpha=1e5, t_beta3=1e5)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_slow', 'exp_avg_sq']
    """

    title = "AdEMAMix"
    paper = "Pagliardini et al. 2024, arXiv:2409.03137"
    advice = "For long runs: a third of AdamW's learning rate up to all of it, and 'total' as t_alpha and t_beta3."
    batch_scaling = "sqrt"
    lr_from_adamw = 0.5
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-3, "alpha": 2.0, "betas": (0.9, 0.95, 0.98)}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "alpha": "α", "t_alpha": "T₁", "t_beta3": "T₃"}
    ranges: ClassVar[dict[str, Any]] = {"alpha": ">= 0", "t_alpha": "> 0", "t_beta3": "> 0"}
    lengths = ("t_alpha", "t_beta3")

    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    alpha: float = 5.0
    t_alpha: float | Literal["total"] | None = None
    t_beta3: float | Literal["total"] | None = None
    eps: float = 1e-8
    weight_decay: float = 0.0

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_slow = Slot("s")  # behind gradients that have become small it is far above the root of v
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["t_beta3"] is not None and not options["betas"][2]:
            raise OptionError(f"{cls.__name__}: t_beta3={options['t_beta3']!r} needs a third beta above 0.")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2, b3 = h.betas
        weight: Operand = h.alpha
        slow: Operand = b3
        if given(h.t_alpha):
            weight = h.alpha * minimum(t / h.t_alpha, 1.0)
        if given(h.t_beta3):
            u = minimum(t / h.t_beta3, 1.0)
            slow = where(u >= 1, b3, exp(1 / ((1 - u) / log(b1) + u / log(b3))))
        return {"c1": 1 - b1**t, "c2": 1 - b2**t, "weight": weight, "slow": slow}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2, _ = h.betas
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_slow = slow = ema(s.exp_avg_slow, g, h.slow)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        return stepped(p, h.lr * (m / h.c1 + h.weight * slow) / (sqrt(v) / sqrt(h.c2) + h.eps), g, h)
