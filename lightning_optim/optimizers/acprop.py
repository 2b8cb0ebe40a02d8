"""ACProp: centred, asynchronous.  Zhuang, Ding, Tang, Dvornek, Tatikonda & Duncan 2021, arXiv:2110.05454.

Differences from the authors' program: the defaults are those of their experiments (no rectification, eps 1e-8),
not those of their class. `ratio_clip` is an addition; without it nothing bounds a step, since the denominator
has not seen the current gradient. The same as in their program: eps is added to s in every step after the first
and stays in it, and the first step is one of plain SGD.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    Options,
    Slot,
    Slots,
    Value,
    clip,
    ema,
    maximum,
    penalized,
    sqrt,
    stepped,
    where,
)
from lightning_optim.language.rectification import rectification, refuse_never_rectified


class ACProp(Optimizer):
    """Divides the gradient by the deviation from the mean that was known before the gradient came.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        s′ₜ = sₜ₋₁ + (ε if t > 1 else 0)
        sₜ = β₂·s′ₜ + (1 − β₂)·(gₜ − mₜ)²
        uₜ = gₜ / (√(s′ₜ / (1 − β₂ᵗ⁻¹ if t > 1 else 1)) + ε)
        θₜ = θₜ₋₁·(1 − α·λ) − (α·uₜ if t > 1 else α·mₜ / (1 − β₁ᵗ))
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the mean gradient and of the mean squared deviation from it, each in [0, 1).
        eps: Added to the mean squared deviation in every step after the first, and again to its root. Nothing
            else keeps the denominator from being zero.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        decoupled: False adds `weight_decay` times the parameter to the gradient, as an L2 penalty, instead.
        amsgrad: Divide by the largest second moment so far instead of the current one, which costs one more
            slot.
        momentum_update: Step along the mean gradient instead of the gradient.
        rectify: Rectify the adaptive rate as RAdam does, with momentum steps at the start; needs beta2 above
            2/3.
        ratio_clip: Largest magnitude of gradient over denominator, at least 0; 0 does not limit it.

    Raises:
        OptionError: if `rectify` is set and beta2 is so small that no step would ever be rectified.

    Note:
        Keep AdamW's learning rate. Do not use it for embeddings without `ratio_clip`: an element whose
        gradients have all been zero has only eps for a denominator. With ratio_clip=1 no element moves further
        than lr. The first step is lr times the gradient.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = ACProp(layer.parameters(), ratio_clip=1.0)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_var']
    """

    title = "ACProp"
    paper = "Zhuang et al. 2021, arXiv:2110.05454"
    advice = "Keep AdamW's learning rate, but give embeddings to another optimizer or set ratio_clip=1."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-3}
    letters: ClassVar[dict[str, str]] = {"known": "s′", "ratio_clip": "c", "ratio": "u"}
    ranges: ClassVar[dict[str, Any]] = {"ratio_clip": ">= 0"}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    amsgrad: bool = False
    momentum_update: bool = False
    rectify: bool = False
    ratio_clip: float = 0.0

    exp_avg = Slot("m")
    # s: a zero would remove the floor of the denominator
    exp_avg_var = Slot("s", signed=False, exact=True, second_moment_by="betas.1", mean_of="deviation before")
    max_exp_avg_var = Slot("ŝ", signed=False, exact=True, mean_of="deviation before")

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["rectify"]:
            refuse_never_rectified(cls.__name__, options["betas"][1])

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        c1, floor = 1 - b1**t, h.eps if h.amsgrad else where(t > 1, h.eps, 0.0)
        if h.rectify:
            adapts, r = rectification(b2, t)
            return {"c1": c1, "floor": floor, "adapts": adapts, "root": 1.0, "r": r * sqrt(1 - b2**t)}
        root = sqrt(where(t > 1, 1 - b2 ** (t - 1), 1.0))  # one step behind
        return {"c1": c1, "floor": floor, "adapts": t > 1, "root": root, "r": 1.0}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        v = known = s.exp_avg_var + h.floor
        if h.amsgrad:
            s.max_exp_avg_var = v = maximum(s.max_exp_avg_var, v)
        s.exp_avg_var = ema(known, (g - m) * (g - m), b2)
        ratio = (m / h.c1 if h.momentum_update else g) / (sqrt(v) / h.root + h.eps)
        if h.ratio_clip:
            ratio = clip(ratio, -h.ratio_clip, h.ratio_clip)
        return stepped(p, where(h.adapts, h.lr * h.r * ratio, h.lr / h.c1 * m), raw, h, h.decoupled)
