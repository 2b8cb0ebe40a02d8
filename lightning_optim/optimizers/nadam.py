"""NAdam: Adam with Nesterov's look-ahead.  Dozat 2016, ICLR workshop, Algorithm 2 with its schedule of the momentum.

As in torch the momentum warms up by beta1 (1 - 0.5 * 0.96^(t momentum_decay)), and the bias correction of the first
moment follows it. With momentum_decay=None it does not: one look-ahead and Adam's own corrections, which is what timm
and AlgoPerf call NAdamW.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, given, penalized, sqrt, stepped


class NAdam(Optimizer):
    """Adam that steps along the mean gradient as it will be after its next decay; equals `torch.optim.NAdam`.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        μₜ = β₁·(1 − 0.5·0.96^(t·ψ))
        Πₜ = Πₜ₋₁·μₜ
        μ′ₜ = β₁·(1 − 0.5·0.96^((t+1)·ψ))
        nₜ = μ′ₜ·mₜ / (1 − Πₜ·μ′ₜ) + (1 − μₜ)·gₜ / (1 − Πₜ)
        θₜ = θₜ₋₁ − α·nₜ / (√(vₜ / (1 − β₂ᵗ)) + ε)
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay, ψ = momentum_decay;
             at the start Π₀ = 1

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean squared gradient), each
            in [0, 1).
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        momentum_decay: How fast the momentum grows from half of `betas[0]` to all of it: at step t it is
            `betas[0] * (1 - 0.5 * 0.96 ** (t * momentum_decay))`. Null keeps it at `betas[0]`, with Adam's bias
            corrections: with `decoupled_weight_decay` that is NAdamW.
        decoupled_weight_decay: True decays the parameter itself, as AdamW does, instead of adding the penalty
            to the gradient.

    Note:
        Keep AdamW's learning rate, or take up to three times as much. AdamW with a look-ahead is
        `NAdam(params, momentum_decay=None, decoupled_weight_decay=True)`. Checkpoints of `torch.optim.NAdam` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = NAdam(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq', 'mu_product']
    """

    title = "NAdam"
    paper = "Dozat 2016, ICLR workshop"
    advice = "Keep AdamW's learning rate, or take up to three times as much."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    letters: ClassVar[dict[str, str]] = {"momentum_decay": "ψ", "mu": "μ", "ahead": "μ′"}
    ranges: ClassVar[dict[str, Any]] = {"momentum_decay": ">= 0"}

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float | None = 4e-3
    decoupled_weight_decay: bool = False

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    mu_product = Slot("Π", per="tensor", init=1.0, from_start=True)  # of the momenta μ of all steps so far

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        if not given(h.momentum_decay):
            return {"c1": 1 - b1**t, "c2": 1 - b2**t}
        mu = b1 * (1 - 0.5 * 0.96 ** (t * h.momentum_decay))
        ahead = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * h.momentum_decay))
        return {"mu": mu, "ahead": ahead, "c2": 1 - b2**t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled_weight_decay)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        if given(h.momentum_decay):
            s.mu_product = product = s.mu_product * h.mu
            n = h.ahead / (1 - product * h.ahead) * m + (1 - h.mu) / (1 - product) * g
        else:
            n = ema(m, g, b1) / h.c1
        return stepped(p, h.lr * n / (sqrt(v) / sqrt(h.c2) + h.eps), raw, h, h.decoupled_weight_decay)
