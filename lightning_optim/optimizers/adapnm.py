"""AdaPNM: Adam under positive-negative momentum.  Xie, Yuan, Zhu & Sugiyama 2021, arXiv:2103.17182.

As in paper and authors' code the first moment's correction is 1 - beta1^t, although a momentum fed every
other step has gathered a little more or less; the first step is therefore 1.7 lr long.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import (
    Operand,
    Options,
    Slot,
    Slots,
    Value,
    decayed,
    ema,
    hypot,
    in_turn,
    is_odd,
    maximum,
    sqrt,
)


class AdaPNM(Optimizer):
    """Adam with two momenta fed in turn, the stale one subtracted.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        betas: Decays of a momentum over one step and of the mean square; weight of the stale momentum.
        eps: Added to the denominator, after the root and its bias correction.
        weight_decay: Share of the parameter, times lr, that is taken away before each step.
        amsgrad: Divide by the largest mean square so far (one more slot); on, as in the authors' code.
        decoupled: False adds weight_decay to the gradient as an L2 penalty instead.

    Note:
        Keep AdamW's learning rate and weight decay; the mean step is 0.45 of AdamW's, with more noise
        around it. Four slots, three without amsgrad.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdaPNM(layer.parameters(), amsgrad=False)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'pos_momentum', 'neg_momentum', 'exp_avg_sq']
    """

    title = "AdaPNM"
    paper = "Xie et al. 2021, arXiv:2103.17182"
    advice = "Keep AdamW's learning rate, up to twice of it."
    batch_scaling = "sqrt"
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    ranges: ClassVar[dict[str, Any]] = {"betas": ("[0, 1)", "[0, 1)", "any")}

    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.999, 1.0)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = True
    decoupled: bool = True

    pos_momentum = Slot()  # fed on odd steps
    neg_momentum = Slot()  # fed on even steps
    exp_avg_sq = Slot(signed=False, mean_square_by="betas.1")  # v
    max_exp_avg_sq = Slot(signed=False, exact=True)  # a maximum must not be rounded down

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2, b0 = h.betas
        return {"odd": is_odd(t), "nu": hypot(1 + b0, b0), "c1": 1 - b1**t, "c2": 1 - b2**t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2, b0 = h.betas
        p, g = decayed(p, g, h, h.decoupled)
        s.pos_momentum, s.neg_momentum, fresh, stale = in_turn(s.pos_momentum, s.neg_momentum, g, h.odd, b1 * b1)
        m = (1 + b0) * fresh - b0 * stale
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        if h.amsgrad:
            s.max_exp_avg_sq = v = maximum(s.max_exp_avg_sq, v)
        return p - h.lr / (h.c1 * h.nu) * m / (sqrt(v) / sqrt(h.c2) + h.eps)
