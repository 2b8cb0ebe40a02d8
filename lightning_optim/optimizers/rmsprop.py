"""RMSprop.  Tieleman & Hinton 2012, lecture 6.5 (no paper); centred form of Graves 2013, arXiv:1308.0850.

As in torch there is no bias correction. One difference: under `centered` the mean square minus the squared mean
is kept from falling below zero by rounding; torch takes the root of it as it is.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import COUPLED, Options, Slot, Slots, Value, ema, maximum, penalized, sqrt, stepped


class RMSprop(Optimizer):
    """Divides the gradient by the root of its mean square; equals `torch.optim.RMSprop`.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        vₜ = α·vₜ₋₁ + (1 − α)·gₜ²
        θₜ = θₜ₋₁ − η·gₜ / (√vₜ + ε)
        with η = lr, α = alpha, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size; the first step is 1 / sqrt(1 - alpha) times as long, ten times at 0.99.
        alpha: Decay rate of the mean square, in [0, 1).
        eps: Added to the denominator, outside the root.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        momentum: Decay rate of the momentum, in [0, 1); 0 keeps none.
        centered: Divide by the standard deviation: subtract the square of the mean gradient, which costs one
            more slot.
        eps_in_sqrt: Add eps inside the root, as optax does.
        tf_style: As in TensorFlow 1: the mean square starts at 1, eps stands inside the root, and lr inside the
            momentum.

    Note:
        AdamW's learning rate is the right size. There is no bias correction, so the first steps are long: warm
        up, or set tf_style=True, whose first steps are short.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = RMSprop(layer.parameters(), lr=1e-3, momentum=0.9)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'square_avg', 'momentum_buffer']
    """

    title = "RMSprop"
    paper = "Tieleman & Hinton 2012, lecture 6.5"
    advice = "Take AdamW's learning rate, not the default, and warm up: the first step is ten times as long."
    batch_scaling = "sqrt"
    lr_from_adamw = 1.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-3}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "alpha": "α", "step": "u"}
    refuses: ClassVar[dict[str, str]] = {"cautious_decay": COUPLED}

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    eps_in_sqrt: bool = False
    tf_style: bool = False

    square_avg = Slot("v", signed=False, mean_square_by="alpha", init=lambda h: 1.0 if h.tf_style else 0.0)
    grad_avg = Slot("ḡ", exact=True)  # its square is subtracted from v
    momentum_buffer = Slot("b", mean_of="normalized gradient")

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        raw, g = g, penalized(p, g, h)
        s.square_avg = v = ema(s.square_avg, g * g, h.alpha)
        if h.centered:
            s.grad_avg = mean = ema(s.grad_avg, g, h.alpha)
            v = maximum(v - mean * mean, 0.0)
        step = g / (sqrt(v + h.eps) if h.eps_in_sqrt or h.tf_style else sqrt(v) + h.eps)
        rate_inside = h.tf_style or not h.momentum
        u = h.lr * step if rate_inside else step
        if h.momentum:
            s.momentum_buffer = u = h.momentum * s.momentum_buffer + u
        return stepped(p, u if rate_inside else h.lr * u, raw, h, decoupled=False)
