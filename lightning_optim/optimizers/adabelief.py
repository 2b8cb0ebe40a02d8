"""AdaBelief: a centred second moment.  Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2.

Follows the authors' package where it differs from the paper: eps is added to s and stays in it, and is added to
the root once more; decay is decoupled; with `rectify` steps are rectified as in RAdam (arXiv:1908.03265), with
momentum steps at the start.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, maximum, penalized, sqrt, stepped, where
from lightning_optim.language.rectification import rectification, refuse_never_rectified


class AdaBelief(Optimizer):
    """Adam that divides by how far gradients stray from their mean, not by how large they are.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        sₜ = β₂·sₜ₋₁ + (1 − β₂)·(gₜ − mₜ)² + ε
        ρ∞ = 2 / (1 − β₂) − 1
        ρₜ = ρ∞ − 2·t·β₂ᵗ / (1 − β₂ᵗ)
        rₜ = √((ρₜ − 4)·(ρₜ − 2)·ρ∞ / ((ρ∞ − 4)·(ρ∞ − 2)·ρₜ) if ρₜ > 5 else 1)
        uₜ = α·rₜ·√(1 − β₂ᵗ)·mₜ / ((1 − β₁ᵗ)·(√sₜ + ε)) if ρₜ > 5 else α·mₜ / (1 − β₁ᵗ)
        θₜ = θₜ₋₁·(1 − α·λ) − uₜ
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the mean gradient and of the mean squared deviation from it, each in [0, 1).
        eps: Added to the mean squared deviation in every step, and again to its root.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        decoupled: False adds `weight_decay` times the parameter to the gradient, as an L2 penalty, instead.
        rectify: Rectify the adaptive rate as RAdam does, with momentum steps at the start; needs beta2 above
            2/3.
        amsgrad: Divide by the largest second moment so far instead of the current one, which costs one more
            slot.

    Raises:
        OptionError: if `rectify` is set and beta2 is so small that no step would ever be rectified.

    Note:
        Keep AdamW's learning rate. eps decides how long steps become where gradients agree with their mean: the
        authors advise 1e-8 for convolutional networks and 1e-16 for transformers.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdaBelief(layer.parameters(), eps=1e-8)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_var']
    """

    title = "AdaBelief"
    paper = "Zhuang et al. 2020, arXiv:2010.07468"
    advice = "Keep AdamW's learning rate; set eps to 1e-8 for convolutional networks."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2, "eps": 1e-8}
    letters: ClassVar[dict[str, str]] = {"step": "u"}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    decoupled: bool = True
    rectify: bool = True
    amsgrad: bool = False

    exp_avg = Slot("m")
    # s: values far below the largest are compared with eps
    exp_avg_var = Slot("s", signed=False, exact=True, second_moment_by="betas.1")
    max_exp_avg_var = Slot("ŝ", signed=False, exact=True)

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["rectify"]:
            refuse_never_rectified(cls.__name__, options["betas"][1])

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        c1, root = 1 - b1**t, sqrt(1 - b2**t)
        if not h.rectify:
            return {"c1": c1, "adapts": True, "root": root, "r": 1.0}
        adapts, r = rectification(b2, t)
        return {"c1": c1, "adapts": adapts, "root": 1.0, "r": r * root}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_var = v = ema(s.exp_avg_var, (g - m) * (g - m), b2) + h.eps
        if h.amsgrad:
            s.max_exp_avg_var = v = maximum(s.max_exp_avg_var, v)
        step = where(h.adapts, h.lr * h.r / h.c1 * m / (sqrt(v) / h.root + h.eps), h.lr / h.c1 * m)
        return stepped(p, step, raw, h, h.decoupled)
