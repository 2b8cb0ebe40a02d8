"""Adam, with AMSGrad's running maximum as an option.  Kingma & Ba 2014, arXiv:1412.6980, Algorithm 1.

AMSGrad is Reddi, Kale & Kumar 2018, arXiv:1904.09237, Algorithm 2. As in torch, its maximum is that of v before
the bias correction, which is applied afterwards; optax takes the maximum of the corrected v.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    Options,
    Slot,
    Slots,
    Value,
    adam_step,
    ema,
    maximum,
    penalized,
    stepped,
)


class Adam(Optimizer):
    """Adam divides the mean gradient by the root of the mean squared gradient; equals `torch.optim.Adam`.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        θₜ = θₜ₋₁ − α·mₜ / ((1 − β₁ᵗ)·(√(vₜ / (1 − β₂ᵗ)) + ε))
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean squared gradient), each
            in [0, 1).
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        amsgrad: Divide by the largest second moment so far instead of the current one, which costs one more
            slot.
        decoupled_weight_decay: True decays the parameter itself, which makes this `AdamW`.

    Note:
        An L2 penalty is divided by the denominator like the rest of the gradient, so weights with large
        gradients hardly decay: use `AdamW` where weight decay matters. Checkpoints of `torch.optim.Adam` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Adam(layer.parameters(), lr=1e-2)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "Adam"
    paper = "Kingma & Ba 2014, arXiv:1412.6980"
    advice = "Start at lr 1e-3; take AdamW instead as soon as weight decay matters."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    decoupled_weight_decay: bool = False

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    max_exp_avg_sq = Slot("v̂", signed=False, exact=True)  # a maximum must not be rounded down

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"c1": 1 - b1**t, "c2": 1 - b2**t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled_weight_decay)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        if h.amsgrad:
            s.max_exp_avg_sq = v = maximum(s.max_exp_avg_sq, v)
        return stepped(p, adam_step(h.lr, m, v, h, h.eps), raw, h, h.decoupled_weight_decay)
