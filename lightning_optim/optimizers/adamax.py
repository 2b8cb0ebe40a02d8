"""AdaMax: Adam under the infinity norm.  Kingma & Ba 2014, arXiv:1412.6980, Algorithm 2.

As in torch, eps is added to |g| inside the maximum. The paper has no eps, and divides by zero where all
gradients so far are zero.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import COUPLED, Operand, Options, Slot, Slots, Value, ema, maximum, penalized, stepped


class AdaMax(Optimizer):
    """Adam with the infinity norm: it divides by a decaying maximum of the gradient; equals `torch.optim.Adamax`.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        uₜ = max(β₂·uₜ₋₁, |gₜ| + ε)
        θₜ = θₜ₋₁ − α·mₜ / ((1 − β₁ᵗ)·uₜ)
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size, and the most that an element can move in one step.
        betas: Decay rates of the mean gradient and of the maximum, each in [0, 1).
        eps: Added to the magnitude of the gradient, inside the maximum.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.

    Note:
        Twice AdamW's learning rate is the usual start. The largest gradient of about the last 1 / (1 - beta2)
        steps sets the step size of an element, so rare large gradients do no harm, and slow the element down
        for a while.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdaMax(layer.parameters())
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_inf']
    """

    title = "AdaMax"
    paper = "Kingma & Ba 2014, arXiv:1412.6980"
    advice = "Start at twice AdamW's learning rate."
    batch_scaling = "sqrt"
    lr_from_adamw = 2.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 2e-2}
    refuses: ClassVar[dict[str, str]] = {"cautious_decay": COUPLED}

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    exp_avg = Slot("m")
    exp_inf = Slot("u", signed=False, second_moment_by="betas.1")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        return {"c1": 1 - h.betas[0] ** t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_inf = u = maximum(b2 * s.exp_inf, abs(g) + h.eps)
        return stepped(p, h.lr / h.c1 * m / u, raw, h, decoupled=False)
