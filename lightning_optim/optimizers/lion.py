"""Lion: evolved sign momentum.  Chen et al. 2023, arXiv:2302.06675, Algorithm 2."""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Options, Slot, Slots, Value, ema, sign, stepped


class Lion(Optimizer):
    """Lion steps by the sign of a momentum: every element moves by lr, with half of Adam's state.

    Formula:
        mₜ = β₂·mₜ₋₁ + (1 − β₂)·gₜ
        θₜ = θₜ₋₁·(1 − η·λ) − η·sign(β₁·mₜ₋₁ + (1 − β₁)·gₜ)
        with η = lr, β₁, β₂ = betas, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size, by which every element moves.
        betas: Decay rates of the mean whose sign is taken and of the mean that is kept, each in [0, 1).
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.

    Note:
        Coming from AdamW take a third to a tenth of its learning rate and 3 to 10 times its weight decay, so
        that their product stays the same. Works best with large batches.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Lion(layer.parameters(), lr=3e-4, weight_decay=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg']
    """

    title = "Lion"
    paper = "Chen et al. 2023, arXiv:2302.06675"
    advice = "Take a third to a tenth of AdamW's learning rate and 3 to 10 times its weight decay."
    batch_scaling = "sqrt"  # the custom for methods of sign
    lr_from_adamw = 0.2
    recommended: ClassVar[dict[str, Any]] = {"lr": 2e-3}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "step": "u"}

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    exp_avg = Slot("m")

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        step = sign(ema(s.exp_avg, g, b1))
        s.exp_avg = ema(s.exp_avg, g, b2)
        return stepped(p, h.lr * step, g, h)
