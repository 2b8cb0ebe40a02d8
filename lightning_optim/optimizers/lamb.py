"""LAMB: layer-wise adaptive moments for batch training.  You et al. 2019, arXiv:1904.00962, Algorithm 2.

phi is the identity unless clamped, as in TensorFlow and apex. Tensors of one axis or none are not scaled
unless the model has no others or always_adapt says so. Clipping by the norm of all gradients is NVIDIA's
addition.
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
    clip,
    ema,
    given,
    has_trust_ratio,
    maximum,
    norm,
    sqrt,
    trust_ratio,
)


class LAMB(Optimizer):
    """AdamW whose step in each tensor has that tensor's norm, times lr.

    Args:
        params: Parameters or parameter groups.
        lr: Step size, as a share of a tensor's norm.
        betas: Decays of the mean gradient and of the mean squared gradient.
        eps: Added to the denominator, after the root and its bias correction.
        weight_decay: Added to the direction, before it is scaled to the tensor's norm.
        bias_correction: Correct both averages for their start at zero.
        max_grad_norm: Clip the norm of all gradients to this; null or 0 is off.
        phi: Smallest and largest norm of a tensor that is counted; null counts it as it is.
        adapt: False switches the scaling off, for a group of biases and norms say.
        always_adapt: Scale tensors of one axis or none too.

    Note:
        For large batches: scale lr by the root of the batch's growth and warm up. Steps are shares of the
        weights' norm, so AdamW's learning rate is a start and not a match; 2e-3 to 1e-2 is usual. Give
        biases and norms weight_decay=0.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = LAMB(layer.parameters(), lr=1e-2)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "LAMB"
    paper = "You et al. 2019, arXiv:1904.00962"
    advice = "For batches of thousands: lr of 2e-3 to 1e-2 with warm-up, no weight decay on biases and norms."
    batch_scaling = "sqrt"
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    ranges: ClassVar[dict[str, Any]] = {"phi": ">= 0"}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    bias_correction: bool = True
    max_grad_norm: float | None = None
    phi: tuple[float, float] | None = None
    adapt: bool = True
    always_adapt: bool = False

    exp_avg = Slot(root_of="exp_avg_sq")  # m
    exp_avg_sq = Slot(signed=False, mean_square_by="betas.1")  # v

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["phi"] is not None and options["phi"][0] > options["phi"][1]:
            raise OptionError(f"{cls.__name__}: phi={options['phi']!r} must hold the smaller norm first.")

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"adapted": has_trust_ratio(h, shape, most_dims)}

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"c1": 1 - b1**t, "c2": 1 - b2**t} if h.bias_correction else {"c1": 1.0, "c2": 1.0}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        if h.max_grad_norm:
            g = g / maximum(norm(g, over="all") / h.max_grad_norm, 1.0)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        u = (m / h.c1) / (sqrt(v) / sqrt(h.c2) + h.eps) + h.weight_decay * p
        if not h.adapted:
            return p - h.lr * u
        w, n = norm(p), norm(u)
        if given(h.phi):
            w = clip(w, h.phi[0], h.phi[1])
        r = trust_ratio(w, n, w / n)
        return p - h.lr * r * u
