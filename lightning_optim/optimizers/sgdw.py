"""SGDW: momentum with decoupled weight decay.  Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 1.

Differences from the paper, the same as in torch and in the authors' Lua program: the learning rate stands
outside the momentum, and scales the decay, which the paper scales by the factor of the schedule only. The first
momentum is the first gradient, without dampening.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, OptionError, Options, Slot, Slots, Value, stepped, where


class SGDW(Optimizer):
    """SGD with momentum whose weight decay does not pass through the momentum.

    Formula:
        mₜ = μ·mₜ₋₁ + (1 − τ if t > 1 else 1)·gₜ
        θₜ = θₜ₋₁·(1 − α·λ) − α·mₜ
        with α = lr, μ = momentum, τ = dampening, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        momentum: Decay rate of the momentum, in [0, 1); 0 keeps no state at all.
        dampening: Share of each gradient that the momentum leaves out, in [0, 1]; the first gradient counts in
            full.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        nesterov: Step along the momentum as it will be after its next decay (Nesterov).

    Raises:
        OptionError: for `nesterov=True` without momentum or with dampening.

    Note:
        Coming from `torch.optim.SGD` keep lr and multiply weight_decay by 1 / (1 - momentum), which is ten at
        0.9: there the momentum adds the penalty up. Coming from AdamW start at 30 to 100 times its learning
        rate.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = SGDW(layer.parameters(), lr=0.1, weight_decay=5e-3)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'momentum_buffer']
    """

    title = "SGDW"
    paper = "Loshchilov & Hutter 2019, arXiv:1711.05101"
    advice = "Start at lr 0.1 with momentum 0.9, and at ten times the weight decay that torch.optim.SGD had."
    batch_scaling = "linear"
    lr_from_adamw = 100.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 0.1}

    lr: float = 1e-3
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    momentum_buffer = Slot("m")

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise OptionError(
                f"{cls.__name__}: nesterov=True needs momentum above 0 and dampening=0; "
                f"got momentum={options['momentum']!r} and dampening={options['dampening']!r}."
            )

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        return {"share": where(t > 1, 1 - h.dampening, 1.0)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        if not h.momentum:
            return stepped(p, h.lr * g, g, h)
        s.momentum_buffer = b = h.momentum * s.momentum_buffer + h.share * g
        return stepped(p, h.lr * (g + h.momentum * b if h.nesterov else b), g, h)
