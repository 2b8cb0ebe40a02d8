"""LARS: layer-wise adaptive rate scaling.  You, Gitman & Ginsburg 2017, arXiv:1708.03888, Algorithm 1.

The ratio's denominator is the paper's, the sum of both norms, where TensorFlow and optax take the norm of
the sum. Tensors of one axis or none are not scaled unless the model has no others or always_adapt says so.
"""

from typing import Any, ClassVar

import torch

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    OptionError,
    Options,
    Slot,
    Slots,
    Value,
    has_trust_ratio,
    minimum,
    norm,
    trust_ratio,
)


class LARS(Optimizer):
    """SGD with momentum whose step in each tensor is a share of that tensor's norm.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        momentum: Decay of the velocity; 0 keeps no state at all.
        weight_decay: L2 penalty, added to the gradient and to the ratio's denominator.
        trust_coefficient: Share of a tensor's norm that a step of lr 1 may have.
        eps: Added to the ratio's denominator.
        nesterov: Step along the velocity as it will be after the next decay.
        adapt: False switches the ratio off, for a group of biases and norms say.
        always_adapt: Scale tensors of one axis or none too.
        lr_inside_buffer: The velocity holds lr, as in the paper; False multiplies by lr afterwards.
        trust_clip: Never step further than plain SGD would (LARC).

    Note:
        For large batches: lr from 0.1 to 30 with warm-up and polynomial decay to 0, SGD's weight decay on
        weights, none on biases and norms. At batches below some thousands SGDW is the simpler choice.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = LARS(layer.parameters(), lr=10.0)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'momentum_buffer']
    """

    title = "LARS"
    paper = "You et al. 2017, arXiv:1708.03888"
    advice = "For batches of thousands: lr of 1 to 30 with warm-up, no weight decay on biases and norms."
    batch_scaling = "linear"
    recommended: ClassVar[dict[str, Any]] = {"lr": 3.0}
    ranges: ClassVar[dict[str, Any]] = {"trust_coefficient": "> 0"}

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    trust_coefficient: float = 1e-3
    eps: float = 0.0
    nesterov: bool = False
    adapt: bool = True
    always_adapt: bool = False
    lr_inside_buffer: bool = True
    trust_clip: bool = False

    momentum_buffer = Slot()  # b

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["nesterov"] and options["momentum"] == 0:
            raise OptionError(f"{cls.__name__}: nesterov=True needs momentum above 0.")

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"adapted": has_trust_ratio(h, shape, most_dims)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        inside: Operand
        inside, outside = (h.lr, 1.0) if h.lr_inside_buffer else (1.0, h.lr)
        if h.adapted:
            w, n = norm(p), norm(g)
            r = trust_ratio(w, n, h.trust_coefficient * w / (n + h.weight_decay * w + h.eps))
            inside = inside * (minimum(r / h.lr, 1.0) if h.trust_clip else r)
        d = inside * (g + h.weight_decay * p)
        if h.momentum:
            s.momentum_buffer = b = h.momentum * s.momentum_buffer + d
            d = h.momentum * b + d if h.nesterov else b
        return p - outside * d
