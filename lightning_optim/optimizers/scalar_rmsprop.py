"""Scalar RMSprop: one rate for the whole vector.  Su Jianlin 2018, kexue.fm archive 6234 (reconstruction).

A reconstruction, since the post was not accessible: gradient flow with steps of constant length, where the
squared length is a moving average. Published relatives are AdaGrad-Norm and AdaSGD (Wang & Wiens 2020,
arXiv:2006.16541).
"""

from typing import Any, ClassVar, Literal

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, count, ema, penalized, sqrt, stepped, total


class ScalarRMSprop(Optimizer, name="scalar_rmsprop"):
    """Divides the gradient by a moving average of its norm: the direction of SGD, at a length that lr sets.

    Formula:
        Gₜ = α·Gₜ₋₁ + (1 − α)·‖gₜ‖ₐₗₗ²
        θₜ = θₜ₋₁·(1 − η·λ) − η·gₜ / (√Gₜ + ε)
        with η = lr, α = alpha, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Length of a typical step of all parameters together, or of one element under `normalize_by_dim`.
        alpha: Decay rate of the mean squared norm, in [0, 1).
        eps: Added to the denominator, outside the root.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        scope: Take one norm over all parameters ("global") or one for each tensor ("tensor").
        normalize_by_dim: Divide the squared norm by the number of elements.
        debias: Correct the mean for its start at zero; without it the first step is 1 / sqrt(1 - alpha) times
            as long.
        decoupled: False adds `weight_decay` times the parameter to the gradient, and so to the norm, instead.

    Note:
        No state per element at all. Coming from AdamW set normalize_by_dim=True and debias=True and keep the
        learning rate; coming from SGD, note that by default lr is the length of the whole step.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = ScalarRMSprop(layer.parameters(), normalize_by_dim=True, debias=True)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step']
    """

    title = "Scalar RMSprop"
    paper = "Su 2018, kexue.fm archive 6234 (reconstruction)"
    advice = "Set normalize_by_dim=True and debias=True, and AdamW's learning rate transfers."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-3, "normalize_by_dim": True, "debias": True}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "alpha": "α"}

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    scope: Literal["global", "tensor"] = "global"
    normalize_by_dim: bool = False
    debias: bool = False
    decoupled: bool = True

    global_square_avg = Slot("G", signed=False, per="optimizer", second_moment_by="alpha")
    global_weight = Slot("W", signed=False, per="optimizer")  # 1 - alpha^t, t counting steps of the optimizer
    square_avg = Slot("G", signed=False, per="tensor", second_moment_by="alpha")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        return {"c": 1 - h.alpha**t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        raw, g = g, penalized(p, g, h, h.decoupled)
        over: Literal["all", "tensor"] = "all" if h.scope == "global" else "tensor"
        N = total(g * g, over)
        if h.normalize_by_dim:
            N = N / count(g, over)
        if h.scope == "global":
            s.global_square_avg = G = ema(s.global_square_avg, N, h.alpha)
        else:
            s.square_avg = G = ema(s.square_avg, N, h.alpha)
        if h.debias and h.scope == "global":
            s.global_weight = W = h.alpha * s.global_weight + (1 - h.alpha)
            G = G / W
        elif h.debias:
            G = G / h.c
        return stepped(p, h.lr / (sqrt(G) + h.eps) * g, raw, h, h.decoupled)
