"""SGD with moment estimation (reconstruction).  Zhang, Lin, Das, Sra & Jadbabaie 2022, ICML, PMLR 162:26347.

A reconstruction from the abstract, since the algorithm in the paper was not accessible: a step that is divided
by a moving average of the gradient's norm, which has not seen the current gradient, plus an offset.
"""

from typing import Any, ClassVar, Literal

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, sqrt, stepped, total, where


def first_value(h: Any) -> float:
    """What G is before the first step; with init="first" the first step sets it."""
    first: float = 0.0 if h.init == "first" else h.init
    return first


class MomentEstimationSGD(Optimizer, name="moment_estimation_sgd"):
    """Divides the gradient by the norm that earlier gradients lead to expect (a reconstruction of the method).

    Formula:
        Nₜ = ‖gₜ‖ₐₗₗ²
        Ĝₜ = Gₜ₋₁ if kₜ₋₁ > 0 else Nₜ
        Gₜ = β·Ĝₜ + (1 − β)·Nₜ
        kₜ = kₜ₋₁ + 1
        θₜ = θₜ₋₁·(1 − α·λ) − α·gₜ / (√Ĝₜ + ε)
        with α = lr, β = beta, ε = offset, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Length of a typical step of all parameters together.
        beta: Decay rate of the mean squared norm, in [0, 1).
        offset: Added to the denominator, at least 0; as large as the norm of the gradient it makes steps
            calmer.
        init: First mean squared norm: that of the "first" gradient, or a number of at least 0.
        delayed: Divide by the mean as it was before this gradient; False includes the gradient from the second
            step on.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        scope: Take one norm over all parameters ("global") or one for each tensor ("tensor").

    Note:
        No state per element. The denominator lags, so a gradient that is 100 times as large makes a step that
        is 100 times as long: clip gradients. AdamW's learning rate does not carry over, since lr is the length
        of the whole step.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = MomentEstimationSGD(layer.parameters(), scope="tensor")
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'square_avg']
    """

    title = "Moment estimation SGD (reconstruction)"
    paper = "Zhang et al. 2022, PMLR 162:26347 (reconstruction)"
    advice = "Clip gradients, and choose lr as the length of a step of the whole model."
    batch_scaling = "sqrt"  # it divides by the norm of the gradient
    lr_from_adamw = 10.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 0.1}
    letters: ClassVar[dict[str, str]] = {"offset": "ε", "known": "Ĝ", "init": "G₀"}
    ranges: ClassVar[dict[str, Any]] = {"offset": ">= 0", "init": ">= 0"}
    refuses: ClassVar[dict[str, str]] = {"cautious": "its step is the gradient times one number"}

    lr: float = 1e-2
    beta: float = 0.99
    offset: float = 1e-8
    init: Literal["first"] | float = "first"
    delayed: bool = True
    weight_decay: float = 0.0
    scope: Literal["global", "tensor"] = "global"

    global_square_avg = Slot("G", signed=False, per="optimizer", init=first_value, second_moment_by="beta")
    global_steps = Slot("k", signed=False, per="optimizer")
    square_avg = Slot("G", signed=False, per="tensor", init=first_value, second_moment_by="beta")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        return {"steps": t - 1.0}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        everywhere = h.scope == "global"
        N = total(g * g, over="all" if everywhere else "tensor")
        G, steps = (s.global_square_avg, s.global_steps) if everywhere else (s.square_avg, h.steps)
        if h.init == "first":
            G = where(steps > 0, G, N)
        mean = ema(G, N, h.beta)
        if everywhere:
            s.global_square_avg, s.global_steps = mean, steps + 1
        else:
            s.square_avg = mean
        known = G if h.delayed else where(steps > 0, mean, G)
        return stepped(p, h.lr / (sqrt(known) + h.offset) * g, g, h)
