"""PNM: positive-negative momentum.  Xie, Yuan, Zhu & Sugiyama 2021, arXiv:2103.17182.

Whether a step is odd or even is decided by the step counter of each tensor, so a tensor that misses a step does
not exchange its momenta.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, hypot, in_turn, is_odd, penalized, stepped


class PNM(Optimizer):
    """SGD with two momenta that take gradients in turn; the older one is subtracted, which adds noise.

    Formula:
        mₜ = β₁²·(m⁺ₜ₋₁ if t is odd else m⁻ₜ₋₁) + (1 − β₁²)·gₜ
        m⁺ₜ = mₜ if t is odd else m⁺ₜ₋₁
        m⁻ₜ = m⁻ₜ₋₁ if t is odd else mₜ
        m′ₜ = m⁻ₜ₋₁ if t is odd else m⁺ₜ₋₁
        θₜ = θₜ₋₁·(1 − α·λ) − α·((1 + β₀)·mₜ − β₀·m′ₜ) / √((1 + β₀)² + β₀²)
        with α = lr, β₁, β₀ = betas, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rate of the momentum per step, in [0, 1), and the weight beta0 of the older momentum, any
            number, usually 1.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        decoupled: False adds `weight_decay` times the parameter to the gradient, as an L2 penalty, instead.

    Note:
        For equal gradients a step tends to 0.447 gradients, where that of SGD with momentum 0.9 tends to 10:
        take 22 times SGD's learning rate for the same mean step, and then a 22nd of its weight decay. A second
        beta of 0 is not the usual momentum: it is two momenta that each see every other gradient.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = PNM(layer.parameters(), lr=1.0)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'pos_momentum', 'neg_momentum']
    """

    title = "PNM"
    paper = "Xie et al. 2021, arXiv:2103.17182"
    advice = "Start at 10 to 22 times the learning rate of SGD with momentum 0.9."
    batch_scaling = "linear"
    lr_from_adamw = 300.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 2.0}
    letters: ClassVar[dict[str, str]] = {"betas.1": "β₀", "fresh": "m", "stale": "m′"}
    ranges: ClassVar[dict[str, Any]] = {"betas": ("[0, 1)", "any")}

    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 1.0)
    weight_decay: float = 0.0
    decoupled: bool = True

    pos_momentum = Slot("m⁺")  # fed on odd steps
    neg_momentum = Slot("m⁻")  # fed on even steps

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b0 = h.betas[1]
        return {"odd": is_odd(t), "nu": hypot(1 + b0, b0)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b0 = h.betas
        raw, g = g, penalized(p, g, h, h.decoupled)
        s.pos_momentum, s.neg_momentum, fresh, stale = in_turn(s.pos_momentum, s.neg_momentum, g, h.odd, b1 * b1)
        return stepped(p, h.lr / h.nu * ((1 + b0) * fresh - b0 * stale), raw, h, h.decoupled)
