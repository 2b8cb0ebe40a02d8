"""RAdam: rectified Adam.  Liu, Jiang, He, Chen, Liu, Gao & Han 2019, arXiv:1908.03265, Algorithm 2.

As in torch and in all other programs, steps are rectified where rho is above 5, where the paper has 4, and eps
is added to the root before the bias correction. The authors' program by default skips the steps that are not
rectified, and their weight decay with them: fallback="skip" with decoupled_weight_decay=True.
"""

from typing import Any, ClassVar, Literal

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, penalized, sqrt, stepped, where
from lightning_optim.language.rectification import rectification, refuse_never_rectified


class RAdam(Optimizer):
    """Adam that takes momentum steps until its second moment can be trusted; equals `torch.optim.RAdam`.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        ρ∞ = 2 / (1 − β₂) − 1
        ρₜ = ρ∞ − 2·t·β₂ᵗ / (1 − β₂ᵗ)
        rₜ = √((ρₜ − 4)·(ρₜ − 2)·ρ∞ / ((ρ∞ − 4)·(ρ∞ − 2)·ρₜ) if ρₜ > threshold else 1)
        uₜ = α·rₜ·√(1 − β₂ᵗ)·mₜ / ((1 − β₁ᵗ)·(√vₜ + ε)) if ρₜ > threshold else α·mₜ / (1 − β₁ᵗ)
        θₜ = θₜ₋₁ − uₜ
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean squared gradient), each
            in [0, 1). The second must be above 2/3.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        decoupled_weight_decay: True decays the parameter itself, as AdamW does, instead of adding the penalty
            to the gradient.
        threshold: Steps are rectified once the moving average is longer than this number of steps; at least 4.
        fallback: Before that, take "momentum" steps, or "skip" steps, together with a decoupled weight decay.

    Raises:
        OptionError: if beta2 is so small that no step would ever be rectified.

    Note:
        Keep AdamW's learning rate and leave out its warm-up. The first five steps are lr times the mean
        gradient: set fallback="skip" where gradients are far above 1 at the start. Checkpoints of
        `torch.optim.RAdam` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = RAdam(layer.parameters(), weight_decay=1e-2, decoupled_weight_decay=True)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "RAdam"
    paper = "Liu et al. 2019, arXiv:1908.03265"
    advice = "Keep AdamW's learning rate, drop its warm-up."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    letters: ClassVar[dict[str, str]] = {"step": "u"}
    ranges: ClassVar[dict[str, Any]] = {"threshold": ">= 4"}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    threshold: float = 5.0
    fallback: Literal["momentum", "skip"] = "momentum"

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        refuse_never_rectified(cls.__name__, options["betas"][1], options["threshold"])

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        rectified, r = rectification(b2, t, h.threshold)
        return {"c1": 1 - b1**t, "rectified": rectified, "r": r * sqrt(1 - b2**t)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled_weight_decay)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        step = where(h.rectified, h.lr * h.r / h.c1 * m / (sqrt(v) + h.eps), h.lr / h.c1 * m)
        moved = stepped(p, step, raw, h, h.decoupled_weight_decay)
        return moved if h.fallback == "momentum" else where(h.rectified, moved, p)
