"""RAdam: rectified Adam.  Liu, Jiang, He, Chen, Liu, Gao & Han 2019, arXiv:1908.03265, Algorithm 2.

As in torch and in all code the rectified steps begin where rho exceeds 5, not 4 as in the paper, and eps is
added to the root before the bias correction. The authors' program skips the un-rectified steps by default,
and their weight decay with them: fallback="skip" with decoupled_weight_decay=True.
"""

from typing import Any, ClassVar, Literal

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, decayed, ema, sqrt, where
from lightning_optim.language.rectification import rectification, refuse_never_rectified


class RAdam(Optimizer):
    """Adam that takes plain momentum steps until its mean square can be trusted; equals `torch.optim.RAdam`.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        betas: Decays of the mean gradient and of the mean squared gradient; the second above 2/3.
        eps: Added to the root of the mean square, before its bias correction.
        weight_decay: L2 penalty, added to the gradient.
        decoupled_weight_decay: Decay the parameter itself, as AdamW does.
        threshold: Length of the moving average, at least 4, above which steps are rectified.
        fallback: Before that take "momentum" steps, or "skip" the steps, and a decoupled decay with them.

    Note:
        Keep AdamW's learning rate and drop the warm-up. The first five steps are lr times the mean gradient; take
        fallback="skip" where gradients are far above 1 at the start. Checkpoints of `torch.optim.RAdam` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = RAdam(layer.parameters(), weight_decay=1e-2, decoupled_weight_decay=True)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    title = "RAdam"
    paper = "Liu et al. 2019, arXiv:1908.03265"
    advice = "Keep AdamW's learning rate, drop its warm-up."
    batch_scaling = "sqrt"
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    ranges: ClassVar[dict[str, Any]] = {"threshold": ">= 4"}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    threshold: float = 5.0
    fallback: Literal["momentum", "skip"] = "momentum"

    exp_avg = Slot(root_of="exp_avg_sq")  # m
    exp_avg_sq = Slot(signed=False, mean_square_by="betas.1")  # v

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        refuse_never_rectified(cls.__name__, options["betas"][1], options["threshold"])

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        rectified, r = rectification(b2, t, h.threshold)
        return {"c1": 1 - b1**t, "rectified": rectified, "r": r * sqrt(1 - b2**t)}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        before = p
        p, g = decayed(p, g, h, h.decoupled_weight_decay)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, b2)
        unrectified = p - h.lr / h.c1 * m if h.fallback == "momentum" else before
        return where(h.rectified, p - h.lr * h.r / h.c1 * m / (sqrt(v) + h.eps), unrectified)
