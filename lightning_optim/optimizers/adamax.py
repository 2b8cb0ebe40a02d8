"""AdaMax: Adam under the infinity norm.  Kingma & Ba 2014, arXiv:1412.6980, Algorithm 2.

As in torch, eps is added to |g| inside the maximum; the paper has no eps and divides by zero where the
first gradients are zero.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, decayed, ema, maximum


class AdaMax(Optimizer):
    """Adam that divides by a decaying maximum of the gradient; equals `torch.optim.Adamax`.

    Args:
        params: Parameters or parameter groups.
        lr: Step size, and the most that an element moves in one step.
        betas: Decays of the mean gradient and of the maximum.
        eps: Added to the gradient's magnitude inside the maximum.
        weight_decay: L2 penalty, added to the gradient.

    Note:
        Twice AdamW's learning rate is the usual start. It holds the largest gradient of the last 1 / (1 -
        beta2) steps against every element, so it is calm under rare large gradients, and slow after one.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdaMax(layer.parameters())
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_inf']
    """

    title = "AdaMax"
    paper = "Kingma & Ba 2014, arXiv:1412.6980"
    advice = "Start at twice AdamW's learning rate."
    batch_scaling = "sqrt"
    recommended: ClassVar[dict[str, Any]] = {"lr": 2e-2}

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    exp_avg = Slot()  # m
    exp_inf = Slot(signed=False, second_moment_by="betas.1")  # u

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        return {"c1": 1 - h.betas[0] ** t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        b1, b2 = h.betas
        p, g = decayed(p, g, h, decoupled=False)
        s.exp_avg = m = ema(s.exp_avg, g, b1)
        s.exp_inf = u = maximum(b2 * s.exp_inf, abs(g) + h.eps)
        return p - h.lr / h.c1 * m / u
