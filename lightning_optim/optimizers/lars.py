"""LARS: layer-wise adaptive rate scaling.  You, Gitman & Ginsburg 2017, arXiv:1708.03888, Algorithm 1.

The denominator of the trust ratio is the paper's, the sum of both norms; TensorFlow and optax take the norm of
the sum. Tensors with fewer than two axes have no trust ratio, unless no tensor has more axes or `always_adapt`
is set.
"""

from typing import Any, ClassVar

import torch

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    COUPLED,
    Operand,
    OptionError,
    Options,
    Slot,
    Slots,
    Value,
    has_trust_ratio,
    minimum,
    norm,
    stepped,
    trust_ratio,
)


class LARS(Optimizer):
    """SGD with momentum whose step in each tensor is relative to the norm of that tensor.

    Formula:
        rₜ = η·‖θₜ₋₁‖ / (‖gₜ‖ + λ·‖θₜ₋₁‖ + ε) if ‖θₜ₋₁‖ > 0 and ‖gₜ‖ > 0 else 1
        vₜ = μ·vₜ₋₁ + γ·rₜ·(gₜ + λ·θₜ₋₁)
        θₜ = θₜ₋₁ − vₜ
        with γ = lr, μ = momentum, λ = weight_decay, η = trust_coefficient, ε = eps

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        momentum: Decay rate of the momentum, in [0, 1); 0 keeps no state at all.
        weight_decay: L2 penalty, added to the gradient and counted in the trust ratio.
        trust_coefficient: How long a step is, relative to the norm of the tensor, at lr=1; above 0.
        eps: Added to the denominator of the trust ratio.
        nesterov: Step along the momentum as it will be after its next decay (Nesterov).
        adapt: False switches the trust ratio off, for example in a parameter group of biases and norms.
        always_adapt: Give tensors with fewer than two axes (biases, norms) a trust ratio too. By default they
            have none, unless no tensor of the optimizer has more axes.
        lr_inside_buffer: Multiply by lr before the momentum takes the step in, as the paper does; False
            multiplies the momentum by lr.
        trust_clip: Never step further than plain SGD would (LARC).

    Raises:
        OptionError: for `nesterov=True` without momentum.

    Note:
        For batches of thousands: lr from 0.1 to 30 with warm-up and polynomial decay to 0, SGD's weight decay
        on weights and none on biases and norms. For smaller batches `SGDW` is the simpler choice.

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
    lr_from_adamw = 1000.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 3.0}
    letters: ClassVar[dict[str, str]] = {"lr": "γ", "trust_coefficient": "η"}
    ranges: ClassVar[dict[str, Any]] = {"trust_coefficient": "> 0"}
    refuses: ClassVar[dict[str, str]] = {"cautious_decay": COUPLED}

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

    momentum_buffer = Slot("v", mean_of="gradient times its rate")

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
        return stepped(p, outside * d, g, h, decoupled=False)
