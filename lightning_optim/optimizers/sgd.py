"""SGD with momentum.  Robbins & Monro 1951; Polyak 1964, heavy ball; Nesterov's form of Sutskever et al. 2013.

As in torch the learning rate stands outside the momentum, and the first momentum is the first gradient, without
dampening.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    COUPLED,
    Operand,
    OptionError,
    Options,
    Slot,
    Slots,
    Value,
    penalized,
    stepped,
    where,
)


class SGD(Optimizer):
    """Steps along the gradient, or along its momentum; equals `torch.optim.SGD`.

    Formula:
        θₜ = θₜ₋₁ − α·(gₜ + λ·θₜ₋₁)
        with α = lr, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        momentum: Decay rate of the momentum, in [0, 1); 0 keeps no state at all.
        dampening: Share of each gradient that the momentum leaves out, in [0, 1]; the first gradient counts in
            full.
        weight_decay: L2 penalty: `weight_decay` times the parameter is added to the gradient.
        nesterov: Step along the momentum as it will be after its next decay (Nesterov).

    Raises:
        OptionError: for `nesterov=True` without momentum or with dampening.

    Note:
        Coming from AdamW start at 30 to 100 times its learning rate with momentum 0.9, and at 300 to 1000 times
        without. The momentum adds the penalty up; in `SGDW` it does not. Checkpoints of `torch.optim.SGD` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'momentum_buffer']
    """

    title = "SGD"
    paper = "Robbins & Monro 1951; momentum: Polyak 1964"
    advice = "Keep what you gave torch.optim.SGD. From AdamW: 30 to 100 times its learning rate with momentum 0.9."
    batch_scaling = "linear"
    lr_from_adamw = 30.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 0.03, "momentum": 0.9}
    refuses: ClassVar[dict[str, str]] = {"cautious_decay": COUPLED}

    lr: float = 1e-3
    momentum: float = 0.0
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
        d = penalized(p, g, h)
        if h.momentum:
            s.momentum_buffer = b = h.momentum * s.momentum_buffer + h.share * d
            d = d + h.momentum * b if h.nesterov else b
        return stepped(p, h.lr * d, g, h, decoupled=False)
