"""Adam, with AMSGrad's running maximum as an option.  Kingma & Ba 2014, arXiv:1412.6980, Algorithm 1.

AMSGrad is Reddi, Kale & Kumar 2018, arXiv:1904.09237, Algorithm 2. As in torch, its maximum runs over v
before the bias correction and the correction is applied afterwards; optax takes the maximum of the
corrected v.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, decayed, ema, maximum, sqrt


class Adam(Optimizer):
    """Mean gradient over the root of the mean squared gradient; equals `torch.optim.Adam`.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        betas: Decays of the mean gradient and of the mean squared gradient.
        eps: Added to the denominator, after the root and its bias correction.
        weight_decay: L2 penalty, added to the gradient.
        amsgrad: Divide by the largest mean square so far (one more slot).
        decoupled_weight_decay: Decay the parameter itself, as `AdamW` does.

    Note:
        An L2 penalty is divided by the denominator too, so weights with large gradients hardly decay: use
        `AdamW` where weight decay matters. Checkpoints of `torch.optim.Adam` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Adam(layer.parameters(), lr=1e-2)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "Adam"
    paper = "Kingma & Ba 2014, arXiv:1412.6980"
    advice = "Start at lr 1e-3; take AdamW instead as soon as weight decay matters."
    batch_scaling = "sqrt"
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    decoupled_weight_decay: bool = False

    exp_avg = Slot(root_of="exp_avg_sq")  # m
    exp_avg_sq = Slot(signed=False, mean_square_by="betas.1")  # v
    max_exp_avg_sq = Slot(signed=False, exact=True)  # a maximum must not be rounded down

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"c1": 1 - b1**t, "c2": 1 - b2**t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        p, g = decayed(p, g, h, h.decoupled_weight_decay)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        if h.amsgrad:
            s.max_exp_avg_sq = v = maximum(s.max_exp_avg_sq, v)
        return p - h.lr / h.c1 * m / (sqrt(v) / sqrt(h.c2) + h.eps)
