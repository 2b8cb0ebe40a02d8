"""LAMB: layer-wise adaptive moments for batch training.  You et al. 2019, arXiv:1904.00962, Algorithm 2.

phi is the identity unless bounds are given, as in TensorFlow and apex. Tensors with fewer than two axes have no
trust ratio, unless no tensor has more axes or `always_adapt` is set. Clipping by the norm of all gradients is
an addition of NVIDIA's.
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
    cautious,
    clip,
    decays,
    ema,
    given,
    has_trust_ratio,
    maximum,
    norm,
    sqrt,
    trust_ratio,
    where,
)


class LAMB(Optimizer):
    """AdamW whose step in each tensor is as long as lr times the norm of that tensor.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        uₜ = mₜ / ((1 − β₁ᵗ)·(√(vₜ / (1 − β₂ᵗ)) + ε)) + λ·θₜ₋₁
        rₜ = ‖θₜ₋₁‖ / ‖uₜ‖ if ‖θₜ₋₁‖ > 0 and ‖uₜ‖ > 0 else 1
        θₜ = θₜ₋₁ − η·rₜ·uₜ
        with η = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size, relative to the norm of the tensor.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean squared gradient), each
            in [0, 1).
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: Times the parameter, added to the direction before that is scaled to the tensor's norm.
        bias_correction: Correct both moments for their start at zero.
        max_grad_norm: Clip the norm of all gradients together to this value; null or 0 switches clipping off.
        phi: Bounds between which the norm of a tensor is counted, the smaller first; null counts it as it is.
        adapt: False switches the trust ratio off, for example in a parameter group of biases and norms.
        always_adapt: Give tensors with fewer than two axes (biases, norms) a trust ratio too. By default they
            have none, unless no tensor of the optimizer has more axes.

    Raises:
        OptionError: if the bounds in `phi` stand in the wrong order.

    Note:
        For batches of thousands: let lr grow with the root of the batch size, and warm up. Steps are relative
        to the norm of the weights, so AdamW's learning rate is only a start; 2e-3 to 1e-2 is usual. Give biases
        and norms weight_decay=0.

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
    lr_from_adamw = 5.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    letters: ClassVar[dict[str, str]] = {"lr": "η", "max_grad_norm": "c", "phi.0": "φ₁", "phi.1": "φ₂"}
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

    exp_avg = Slot("m", root_of="exp_avg_sq")
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")

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
        u = (m / h.c1) / (sqrt(v) / sqrt(h.c2) + h.eps)
        u = cautious(u, g, h) + where(decays(p, u, h), h.weight_decay * p, 0.0)
        if not h.adapted:
            return p - h.lr * u
        w, n = norm(p), norm(u)
        if given(h.phi):
            w = clip(w, h.phi[0], h.phi[1])
        r = trust_ratio(w, n, w / n)
        return p - h.lr * r * u
