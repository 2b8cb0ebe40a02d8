"""Generalized SignSGD.  Crawshaw, Liu, Orabona, Zhang & Zhuang 2022, arXiv:2208.11195.

As in the authors' program both means start at zero, and beta2 may be larger than beta1 squared. Bias correction
and decoupled decay are additions.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, penalized, sqrt, stepped


class GeneralizedSignSGD(Optimizer, name="generalized_signsgd"):
    """Adam with the second moment of the momentum: between Adam and the sign of the momentum.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·mₜ²
        θₜ = θₜ₋₁ − α·mₜ / (√vₜ + ε)
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the momentum and of its mean square, each in [0, 1); 0 for the second gives the
            sign of the momentum.
        eps: Added to the denominator, outside the root.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        use_bias_correction: Correct both means for their start at zero.
        decoupled: True decays the parameter itself, as AdamW does, instead of adding the penalty to the
            gradient.

    Note:
        The first step moves every element by lr / sqrt(1 - beta2), 31.6 lr at 0.999: take a fifth of AdamW's
        learning rate, or warm up, or set use_bias_correction=True.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = GeneralizedSignSGD(layer.parameters(), lr=2e-4)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "Generalized SignSGD"
    paper = "Crawshaw et al. 2022, arXiv:2208.11195"
    advice = "Take a fifth of AdamW's learning rate or warm up: the first step is 31.6 times as long as lr."
    batch_scaling = "sqrt"  # the custom for methods of sign
    lr_from_adamw = 0.2
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-3, "use_bias_correction": True}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    use_bias_correction: bool = False
    decoupled: bool = False

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, second_moment_by="betas.1", mean_of="momentum")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"c1": 1 - b1**t, "c2": 1 - b2**t} if h.use_bias_correction else {"c1": 1.0, "c2": 1.0}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, m * m, b2)
        return stepped(p, h.lr / h.c1 * m / (sqrt(v) / sqrt(h.c2) + h.eps), raw, h, h.decoupled)
