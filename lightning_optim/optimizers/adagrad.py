"""Adagrad: rates by the sum of squared gradients.  Duchi, Hazan & Singer 2011, JMLR 12, Figure 1 (diagonal).

As in torch eps is added to the root, where the paper has δ, and the rate may fall as 1 / t besides. The sum of a
tensor starts again with its first gradient; torch makes it when the optimizer is made, with the same value.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import COUPLED, Operand, Options, Slot, Slots, Value, penalized, sqrt, stepped


class Adagrad(Optimizer):
    """Divides each gradient by the root of the sum of all squares so far; equals `torch.optim.Adagrad`.

    Formula:
        gₜ = ∇fₜ + λ·θₜ₋₁
        Gₜ = Gₜ₋₁ + gₜ²
        θₜ = θₜ₋₁ − η·gₜ / ((1 + (t − 1)·κ)·(√Gₜ + ε))
        with η = lr, κ = lr_decay, λ = weight_decay, ε = eps;
             at the start G₀ = initial_accumulator_value

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size; the first step moves every element by it.
        lr_decay: The learning rate of step t is `lr / (1 + (t - 1) * lr_decay)`; 0 leaves it to the sum alone.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        initial_accumulator_value: What the sum of squares starts with; above 0 it shortens the first steps.
        eps: Added to the denominator, outside the root.

    Note:
        Coming from AdamW take 3 to 10 times its learning rate: the sum never forgets, so steps shorten as
        1 / sqrt(t) by themselves, and no schedule is needed. The sum is never rounded to few bits. Gradients are
        dense. Checkpoints of `torch.optim.Adagrad` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Adagrad(layer.parameters(), lr=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'sum']
    """

    title = "Adagrad"
    paper = "Duchi, Hazan & Singer 2011, JMLR 12"
    advice = "Take 3 to 10 times AdamW's learning rate and no schedule: steps shorten by themselves."
    batch_scaling = "sqrt"
    lr_from_adamw = 5.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-2}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "lr_decay": "κ"}
    ranges: ClassVar[dict[str, Any]] = {"lr_decay": ">= 0", "initial_accumulator_value": ">= 0"}
    refuses: ClassVar[dict[str, str]] = {"cautious_decay": COUPLED}

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    # Nothing is forgotten, and so no rounding error is: they would add up.
    sum = Slot("G", signed=False, exact=True, init=lambda h: h.initial_accumulator_value)

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        return {"rate": h.lr / (1 + (t - 1) * h.lr_decay)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        raw, g = g, penalized(p, g, h)
        s.sum = G = s.sum + g * g
        return stepped(p, h.rate * g / (sqrt(G) + h.eps), raw, h, decoupled=False)
