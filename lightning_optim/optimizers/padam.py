"""Padam: partially adaptive momentum.  Chen, Zhou, Tang, Yang, Cao & Gu 2018, arXiv:1806.06763, Algorithm 1.

As in the authors' program the learning rate is multiplied by sqrt(1 - beta2^t) / (1 - beta1^t) for every power,
which acts like a warm-up at the start. debias="consistent" corrects the mean square before the power; "none"
corrects nothing, as in the paper. Decoupled decay is that of GadamX (arXiv:2003.01247).
"""

from typing import Any, ClassVar, Literal

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, maximum, penalized, sqrt, stepped


class Padam(Optimizer):
    """Between Adam and SGD: the denominator of Adam, raised to a power.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        v̂ₜ = max(v̂ₜ₋₁, vₜ)
        θₜ = θₜ₋₁ − α·√(1 − β₂ᵗ)·mₜ / ((1 − β₁ᵗ)·(√v̂ₜ + ε)^(2·p))
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay, p = partial

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean squared gradient), each
            in [0, 1).
        eps: Added to the root of the second moment, before the power.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        partial: Power of the second moment, in (0, 0.5]: 0.5 is AMSGrad, near 0 it is SGD with momentum. The
            paper takes 0.125.
        amsgrad: Divide by the largest second moment so far instead of the current one, which costs one more
            slot.
        decoupled: True decays the parameter itself, as AdamW does, instead of adding the penalty to the
            gradient.
        debias: Bias correction: "official" multiplies the rate as in the authors' program, "consistent"
            corrects before the power, "none" corrects nothing.

    Note:
        Take the learning rate and schedule of SGD with momentum, 0.1, not AdamW's, and SGD's weight decay,
        5e-4.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Padam(layer.parameters(), partial=0.125)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq']
    """

    title = "Padam"
    paper = "Chen et al. 2018, arXiv:1806.06763"
    advice = "Take SGD's learning rate and schedule, 0.1, and partial=0.125."
    batch_scaling = None  # between the rule of SGD and that of Adam
    lr_from_adamw = 100.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 0.3, "partial": 0.125}
    letters: ClassVar[dict[str, str]] = {"partial": "p", "p": "θ"}
    ranges: ClassVar[dict[str, Any]] = {"partial": "(0, 0.5]"}

    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    partial: float = 0.25
    amsgrad: bool = True
    decoupled: bool = False
    debias: Literal["official", "consistent", "none"] = "official"

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    max_exp_avg_sq = Slot("v̂", signed=False, exact=True)  # a maximum must not be rounded down

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        c1, root = 1 - b1**t, sqrt(1 - b2**t)
        if h.debias == "official":
            return {"rate": h.lr * (root / c1), "root": 1.0}
        if h.debias == "consistent":
            return {"rate": h.lr * (1 / c1), "root": root}
        return {"rate": h.lr, "root": 1.0}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        if h.amsgrad:
            s.max_exp_avg_sq = v = maximum(s.max_exp_avg_sq, v)
        return stepped(p, h.rate * m / (sqrt(v) / h.root + h.eps) ** (2 * h.partial), raw, h, h.decoupled)
