"""MARS-AdamW: AdamW on gradients with less variance.  Yuan, Liu, Wu, Zhou & Gu 2024, arXiv:2411.10438, Algorithm 2.

As the authors' program (AGI-Arena/MARS) with `is_approx`: the gradient of the last batch in the place of a second one
of this batch at the last weights. Its rule is for tensors of two axes or more, where theirs is for exactly two, and
AdamW for convolutions. The last gradient starts at zero, as there; timm starts it at the first gradient, and does not
clip that. pytorch_optimizer divides eps by the root of the bias correction.
"""

from typing import Any, ClassVar

import torch

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, maximum, norm, sqrt, stepped


class MARS(Optimizer):
    """AdamW whose gradient is corrected by how it has changed, which takes out a part of its noise.

    Formula:
        cₜ = (gₜ + γ·β₁·(gₜ − gₜ₋₁) / (1 − β₁)) / max(‖gₜ + γ·β₁·(gₜ − gₜ₋₁) / (1 − β₁)‖, 1)
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·cₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·cₜ²
        θₜ = θₜ₋₁·(1 − η·λ) − η·mₜ / ((1 − β₁ᵗ)·(√(vₜ / (1 − β₂ᵗ)) + ε))
        with η = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay, γ = gamma

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size of tensors with two axes or more.
        betas: Decay rates of the first moment and of the second of the corrected gradient, each in [0, 1).
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        gamma: Strength of the correction, at least 0; 0 only clips.
        optimize_1d: Treat tensors with fewer than two axes (biases, norms) like all others.
        lr_1d: Step size of tensors with fewer than two axes. What schedules make of lr they make of it.
        base_lr: The lr at which the step size of those tensors is lr_1d: it is lr_1d * lr / base_lr. null takes the lr
            that its group starts with.
        betas_1d: Decay rates for tensors with fewer than two axes, which AdamW steps on.
        weight_decay_1d: Decoupled weight decay of tensors with fewer than two axes.

    Note:
        Coming from AdamW take 3 times its learning rate for matrices and all of it as lr_1d. A tensor's corrected
        gradient is clipped to norm 1. Three slots, half as much again as AdamW's memory.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = MARS(layer.parameters(), lr=3e-3, weight_decay=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight]), list(optimizer.state[layer.bias])
        (['step', 'exp_avg', 'exp_avg_sq', 'last_grad'], ['step', 'exp_avg', 'exp_avg_sq'])
    """

    title = "MARS"
    paper = "Yuan et al. 2024, arXiv:2411.10438"
    advice = "Take 3 times AdamW's learning rate, and AdamW's as lr_1d."
    batch_scaling = "sqrt"
    lr_from_adamw = 3.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2, "lr_1d": 1e-2}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "gamma": "γ", "last_grad": "g"}
    ranges: ClassVar[dict[str, Any]] = {
        **{"gamma": ">= 0", "lr_1d": ">= 0", "base_lr": ">= 0", "betas_1d": "[0, 1)", "weight_decay_1d": ">= 0"},
    }

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    gamma: float = 0.025
    optimize_1d: bool = False
    lr_1d: float = 3e-3
    base_lr: float | None = None
    betas_1d: tuple[float, float] = (0.9, 0.95)
    weight_decay_1d: float = 0.1

    exp_avg = Slot("m", root_of="exp_avg_sq", mean_of="corrected gradient")
    exp_avg_sq = Slot("v", signed=False, second_moment_by="betas.1", mean_of="corrected gradient")
    last_grad = Slot("g", exact=True, past=True)  # it enters a difference

    @classmethod
    def complete(cls, options: dict[str, Any]) -> None:
        if options["base_lr"] is None:
            options["base_lr"] = float(options["lr"])

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"corrected": h.optimize_1d or len(shape) > 1}

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        (b1, b2), (a1, a2) = h.betas, h.betas_1d
        rate = h.lr_1d * (h.lr / h.base_lr) if h.base_lr else 0.0
        return {"c1": 1 - b1**t, "c2": 1 - b2**t, "c1_1d": 1 - a1**t, "c2_1d": 1 - a2**t, "rate_1d": rate}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas if h.corrected else h.betas_1d
        rate, decay = (h.lr, h.weight_decay) if h.corrected else (h.rate_1d, h.weight_decay_1d)
        c1, c2 = (h.c1, h.c2) if h.corrected else (h.c1_1d, h.c2_1d)
        c = g
        if h.corrected:
            c = g + h.gamma * b1 / (1 - b1) * (g - s.last_grad)
            c = c / maximum(norm(c), 1.0)
            s.last_grad = g
        s.exp_avg = m = ema(s.exp_avg, c, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, c * c, b2)
        return stepped(p, rate * (m / c1) / (sqrt(v) / sqrt(c2) + h.eps), g, h, share=rate * decay)
