"""ADOPT: modified Adam that converges with any second beta.  Taniguchi et al. 2024, arXiv:2411.02853, Algorithm 2.

As the authors' program (iShohei220/adopt), but for `decoupled`, which is True by default, as in AdamW, and False
there. The first step only stores the squared gradient. Others differ: pytorch_optimizer clips to t^0.25 and decays in
the first step too, and timm clips to (t - 1)^0.333 by default.
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
    given,
    maximum,
    penalized,
    sqrt,
    stepped,
    where,
)


class ADOPT(Optimizer):
    """Adam that divides each gradient by the root of the second moment before it, and then averages.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·min(max(gₜ / max(√vₜ₋₁, ε), −(t − 1)^c), (t − 1)^c) if t > 1
             else mₜ₋₁
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ² if t > 1 else gₜ²
        θₜ = θₜ₋₁·(1 − η·λ) − η·(β₁·mₜ₋₁ + (1 − β₁)·min(max(gₜ / max(√vₜ₋₁, ε), −(t − 1)^c), (t − 1)^c)) if t > 1
             else θₜ₋₁
        with η = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay, c = clip_power

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the mean of normalized gradients and of the mean squared gradient, each in [0, 1).
        eps: The least denominator.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        clip_power: Clip normalized gradients to (t - 1) to this power; null does not clip.
        decoupled: False adds `weight_decay` times the parameter to the gradient, as an L2 penalty, instead.

    Note:
        Coming from AdamW take a third of its learning rate up to all of it. The first step moves nothing: it only
        stores the squared gradient.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = ADOPT(layer.parameters(), lr=1e-3, weight_decay=0.01)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "ADOPT"
    paper = "Taniguchi et al. 2024, arXiv:2411.02853"
    advice = "Take a third of AdamW's learning rate up to all of it, and its weight decay."
    batch_scaling = "sqrt"
    lr_from_adamw = 0.5
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-3}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "clip_power": "c"}
    ranges: ClassVar[dict[str, Any]] = {"clip_power": ">= 0"}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.9999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_power: float | None = 0.25
    decoupled: bool = True

    exp_avg = Slot("m", mean_of="normalized gradient")
    exp_avg_sq = Slot("v", signed=False, second_moment_by="betas.1", mean_of="gradient, from the first square on")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        return {"moves": t > 1, **({"bound": (t - 1) ** h.clip_power} if given(h.clip_power) else {})}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled)
        u = g / maximum(sqrt(s.exp_avg_sq), h.eps)
        if given(h.clip_power):
            u = clip(u, -h.bound, h.bound)
        m = ema(s.exp_avg, u, b1)
        s.exp_avg = where(h.moves, m, s.exp_avg)
        s.exp_avg_sq = where(h.moves, ema(s.exp_avg_sq, g * g, b2), g * g)
        return where(h.moves, stepped(p, h.lr * m, raw, h, h.decoupled), p)
