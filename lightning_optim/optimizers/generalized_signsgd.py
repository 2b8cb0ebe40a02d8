"""Generalized SignSGD.  Crawshaw, Liu, Orabona, Zhang & Zhuang 2022, arXiv:2208.11195.

As in the authors' program both averages start at zero and beta2 may be larger than beta1 squared; bias
correction and decoupled decay are additions.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, decayed, ema, sqrt


class GeneralizedSignSGD(Optimizer, name="generalized_signsgd"):
    """Adam whose denominator averages the squared momentum: between Adam and the sign of the momentum.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        betas: Decays of the momentum and of its mean square; a second of 0 gives the momentum's sign.
        eps: Added to the denominator, outside the root.
        weight_decay: L2 penalty, added to the gradient.
        use_bias_correction: Correct both averages for their start at zero.
        decoupled: Decay the parameter itself, as AdamW does.

    Note:
        The first step is lr / sqrt(1 - beta2) for every element, 31.6 lr at 0.999: take a fifth of AdamW's
        learning rate, or warm up, or set use_bias_correction=True.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = GeneralizedSignSGD(layer.parameters(), lr=2e-4)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "Generalized SignSGD"
    paper = "Crawshaw et al. 2022, arXiv:2208.11195"
    advice = "Take a fifth of AdamW's learning rate or warm up: the first step is 31.6 times as long as lr."
    batch_scaling = "sqrt"  # the custom for methods of sign
    recommended: ClassVar[dict[str, Any]] = {"lr": 3e-3, "use_bias_correction": True}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    use_bias_correction: bool = False
    decoupled: bool = False

    exp_avg = Slot(root_of="exp_avg_sq")  # m
    exp_avg_sq = Slot(signed=False, second_moment_by="betas.1")  # v, of the momentum

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        return {"c1": 1 - b1**t, "c2": 1 - b2**t} if h.use_bias_correction else {"c1": 1.0, "c2": 1.0}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        p, g = decayed(p, g, h, h.decoupled)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, m * m, b2)
        return p - h.lr / h.c1 * m / (sqrt(v) / sqrt(h.c2) + h.eps)
