"""diffGrad: friction from the change of the gradient.  Dubey et al. 2019, arXiv:1909.11015.

Follows the authors' corrected program (v2): the previous gradient is a copy, where v1 kept a reference to the
memory into which the next gradient is written. eps is added to the root before the bias correction.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import COUPLED, Operand, Options, Slot, Slots, Value, ema, exp, penalized, sqrt, stepped


class DiffGrad(Optimizer):
    """Adam with friction: an element whose gradient does not change takes half the step.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        θₜ = θₜ₋₁ − α·√(1 − β₂ᵗ)·mₜ / ((1 − β₁ᵗ)·(1 + exp(−|gₜ₋₁ − gₜ|))·(√vₜ + ε))
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean squared gradient), each
            in [0, 1).
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.

    Note:
        Steps are between half of Adam's and all of it, and close to half where gradients are far below 1: take
        up to twice Adam's learning rate. The friction depends on the scale of the gradient, and so on the scale
        of the loss.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = DiffGrad(layer.parameters(), lr=2e-3)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq', 'previous_grad']
    """

    title = "diffGrad"
    paper = "Dubey et al. 2019, arXiv:1909.11015"
    advice = "Take up to twice Adam's learning rate."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 2e-2}
    letters: ClassVar[dict[str, str]] = {"friction": "ξ"}
    refuses: ClassVar[dict[str, str]] = {"cautious_decay": COUPLED}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    previous_grad = Slot("g", root_of="exp_avg_sq", past=True)  # an error in it changes a step by a quarter of itself

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"rate": h.lr * sqrt(1 - b2**t) / (1 - b1**t)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        friction = 1 / (1 + exp(-abs(s.previous_grad - g)))
        s.previous_grad = g
        return stepped(p, h.rate * friction * m / (sqrt(v) + h.eps), raw, h, decoupled=False)
