"""AdaPNM: Adam under positive-negative momentum.  Xie, Yuan, Zhu & Sugiyama 2021, arXiv:2103.17182.

As in paper and program, the bias correction of the first moment is 1 - beta1^t, although a momentum that takes
every other gradient has collected a little more or less. The first step is therefore 1.7 lr long.
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
    hypot,
    in_turn,
    is_odd,
    maximum,
    penalized,
    sqrt,
    stepped,
)


class AdaPNM(Optimizer):
    """Adam with two momenta that take gradients in turn; the older one is subtracted.

    Formula:
        mₜ = β₁²·(m⁺ₜ₋₁ if t is odd else m⁻ₜ₋₁) + (1 − β₁²)·gₜ
        m⁺ₜ = mₜ if t is odd else m⁺ₜ₋₁
        m⁻ₜ = m⁻ₜ₋₁ if t is odd else mₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        v̂ₜ = max(v̂ₜ₋₁, vₜ)
        m′ₜ = m⁻ₜ₋₁ if t is odd else m⁺ₜ₋₁
        θₜ = θₜ₋₁·(1 − α·λ) − α·((1 + β₀)·mₜ − β₀·m′ₜ) / ((1 − β₁ᵗ)·√((1 + β₀)² + β₀²)·(√(v̂ₜ / (1 − β₂ᵗ)) + ε))
        with α = lr, β₁, β₂, β₀ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rate of the momentum per step and of the second moment, each in [0, 1), then the weight
            beta0 of the older momentum, any number.
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        amsgrad: Divide by the largest second moment so far instead of the current one, which costs one more
            slot. On by default, as in the authors' program.
        decoupled: False adds `weight_decay` times the parameter to the gradient, as an L2 penalty, instead.

    Note:
        Keep AdamW's learning rate and weight decay. On average a step is 0.45 times AdamW's, with more noise
        around it. Four slots, three without `amsgrad`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdaPNM(layer.parameters(), amsgrad=False)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'pos_momentum', 'neg_momentum', 'exp_avg_sq']
    """

    title = "AdaPNM"
    paper = "Xie et al. 2021, arXiv:2103.17182"
    advice = "Keep AdamW's learning rate, up to twice of it."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    letters: ClassVar[dict[str, str]] = {"betas.2": "β₀", "fresh": "m", "stale": "m′", "mixed": "m̂"}
    ranges: ClassVar[dict[str, Any]] = {"betas": ("[0, 1)", "[0, 1)", "any")}

    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.999, 1.0)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = True
    decoupled: bool = True

    pos_momentum = Slot("m⁺")  # fed on odd steps
    neg_momentum = Slot("m⁻")  # fed on even steps
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    max_exp_avg_sq = Slot("v̂", signed=False, exact=True)  # a maximum must not be rounded down

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2, b0 = h.betas
        return {"odd": is_odd(t), "nu": hypot(1 + b0, b0), "c1": 1 - b1**t, "c2": 1 - b2**t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2, b0 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled)
        s.pos_momentum, s.neg_momentum, fresh, stale = in_turn(s.pos_momentum, s.neg_momentum, g, h.odd, b1 * b1)
        mixed = (1 + b0) * fresh - b0 * stale
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        if h.amsgrad:
            s.max_exp_avg_sq = v = maximum(s.max_exp_avg_sq, v)
        return stepped(p, h.lr / (h.c1 * h.nu) * mixed / (sqrt(v) / sqrt(h.c2) + h.eps), raw, h, h.decoupled)
