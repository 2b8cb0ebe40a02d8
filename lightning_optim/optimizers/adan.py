"""Adan: adaptive Nesterov momentum.  Xie, Zhou, Li, Lin & Yan 2022, arXiv:2208.06677, Algorithm 1.

Differences from the paper, the same as in the authors' program: all means start at zero and are corrected for
it, where the paper starts them at the first gradient and its square; the first change of the gradient is zero.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    Options,
    Slot,
    Slots,
    Value,
    cautious,
    decays,
    ema,
    minimum,
    norm,
    sqrt,
    stepped,
    where,
)


class Adan(Optimizer):
    """Adam with Nesterov momentum, estimated from how the gradient changes from step to step.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        Δₜ = [t > 1]·(gₜ − gₜ₋₁)
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·Δₜ
        nₜ = β₃·nₜ₋₁ + (1 − β₃)·(gₜ + β₂·Δₜ)²
        movedₜ = θₜ₋₁ − η·(mₜ / (1 − β₁ᵗ) + β₂·vₜ / (1 − β₂ᵗ)) / (√(nₜ / (1 − β₃ᵗ)) + ε)
        θₜ = movedₜ / (1 + η·λ)
        with η = lr, β₁, β₂, β₃ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates, each in [0, 1), of the mean gradient, of its mean change and of the mean square of
            the gradient with its change added. The paper's betas are 1 minus these.
        eps: Added to the denominator, outside the root.
        weight_decay: Proximal weight decay: the parameter is divided by `1 + lr * weight_decay` after the step.
        max_grad_norm: Clip the norm of all gradients together to this value; 0 switches clipping off.
        no_prox: Decay before the step, as AdamW does, instead of dividing after it.

    Note:
        Coming from AdamW take 5 to 10 times its learning rate and weight_decay=0.02. Four slots, twice AdamW's
        memory. `reset` forgets all state, which is the restart of the paper.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Adan(layer.parameters(), lr=5e-3, weight_decay=0.02)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_diff', 'exp_avg_sq', 'prev_grad']
    """

    title = "Adan"
    paper = "Xie et al. 2022, arXiv:2208.06677"
    advice = "Take 5 to 10 times AdamW's learning rate and weight_decay=0.02."
    batch_scaling = "sqrt"
    lr_from_adamw = 5.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 2e-2, "weight_decay": 0.02}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "max_grad_norm": "c", "change": "Δ", "step": "u"}

    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    no_prox: bool = False

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_diff = Slot("v", root_of="exp_avg_sq")
    exp_avg_sq = Slot("n", signed=False, mean_square_by="betas.2")
    prev_grad = Slot("g", exact=True)  # it enters a difference

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2, b3 = h.betas
        return {"c1": 1 - b1**t, "c2": 1 - b2**t, "c3": 1 - b3**t, "moved": where(t > 1, 1.0, 0.0)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2, b3 = h.betas
        if h.max_grad_norm:
            g = g * minimum(h.max_grad_norm / (norm(g, over="all") + h.eps), 1.0)
        change = h.moved * (g - s.prev_grad)  # zero at t = 1
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_diff = d = ema(s.exp_avg_diff, change, b2)
        ahead = g + b2 * change
        s.exp_avg_sq = n = ema(s.exp_avg_sq, ahead * ahead, b3)
        s.prev_grad = g
        step = (m / h.c1 + b2 / h.c2 * d) / (sqrt(n) / sqrt(h.c3) + h.eps)
        if h.no_prox:
            return stepped(p, h.lr * step, g, h)
        moved = p - cautious(h.lr * step, g, h)
        return where(decays(p, step, h), moved / (1 + h.lr * h.weight_decay), moved)
