"""AdaBelief: a centred second moment.  Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2.

As in the authors' package: eps is added to s and stored with it, once more to the root; with `rectify` the
steps are those of RAdam (arXiv:1908.03265), with momentum steps at first, and the decay is decoupled.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, decayed, ema, maximum, sqrt, where
from lightning_optim.language.rectification import rectification, refuse_never_rectified


class AdaBelief(Optimizer):
    """Adam that divides by how far the gradient strays from its mean, not by how large it is.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        betas: Decays of the mean gradient and of the mean squared deviation from it.
        eps: Added to the mean square in every step, and to its root.
        weight_decay: Share of the parameter, times lr, that is taken away before each step.
        decoupled: False adds weight_decay to the gradient as an L2 penalty instead.
        rectify: Take RAdam's steps; beta2 must then be above 2/3.
        amsgrad: Divide by the largest mean square so far (one more slot).

    Note:
        Keep AdamW's learning rate. eps decides how far steps grow where gradients agree: the authors advise
        1e-8 for convolutional networks and 1e-16 for transformers.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdaBelief(layer.parameters(), eps=1e-8)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_var']
    """

    title = "AdaBelief"
    paper = "Zhuang et al. 2020, arXiv:2010.07468"
    advice = "Keep AdamW's learning rate; set eps to 1e-8 for convolutional networks."
    batch_scaling = "sqrt"
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2, "eps": 1e-8}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    decoupled: bool = True
    rectify: bool = True
    amsgrad: bool = False

    exp_avg = Slot()  # m
    # s: values far below the largest are compared with eps
    exp_avg_var = Slot(signed=False, exact=True, second_moment_by="betas.1")
    max_exp_avg_var = Slot(signed=False, exact=True)

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["rectify"]:
            refuse_never_rectified(cls.__name__, options["betas"][1])

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        b1, b2 = h.betas
        c1, root = 1 - b1**t, sqrt(1 - b2**t)
        if not h.rectify:
            return {"c1": c1, "adapts": True, "root": root, "r": 1.0}
        adapts, r = rectification(b2, t)
        return {"c1": c1, "adapts": adapts, "root": 1.0, "r": r * root}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        p, g = decayed(p, g, h, h.decoupled)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_avg_var = v = ema(s.exp_avg_var, (g - m) * (g - m), b2) + h.eps
        if h.amsgrad:
            s.max_exp_avg_var = v = maximum(s.max_exp_avg_var, v)
        return where(h.adapts, p - h.lr * h.r / h.c1 * m / (sqrt(v) / h.root + h.eps), p - h.lr / h.c1 * m)
