"""KOALA-V: the loss as a Kalman filter's measurement.  Davtyan et al. 2022, arXiv:2107.03331, Algorithm 1.

As in the authors' code each tensor has an innovation variance S of its own, and the shared variance P takes
the largest reduction. The decay belongs to the direction too, where their code forgets it
(wd_in_direction=False). `loss_target` is ours; without it lr acts as a target of (1 - lr) times the loss,
as theirs does.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Options, Slot, Slots, Value, given
from lightning_optim.language.kalman import loss_variance, measure, refuse_maximize


class KoalaV(Optimizer, name="koala_v"):
    """Steps as long as the loss asks for: far from the target they are long, at the target they vanish.

    Args:
        params: Parameters or parameter groups.
        lr: Share of the distance to loss_target that one step aims at; 1 aims at all of it.
        sigma: First variance of the weights; the authors' script takes 0.1.
        q: What the variance grows by in each step.
        r: Variance of the loss; null estimates it from the losses.
        alpha_r: Decay of that estimate.
        R0: First value of that estimate.
        weight_decay: L2 penalty; it enters the loss, the gradient and the direction.
        loss_target: The loss to be reached: 0 for a loss whose minimum is 0.
        wd_in_direction: False leaves the penalty out of the direction, as the authors' code does.

    Note:
        Needs the loss: call `step(closure)`, or `set_loss(loss, mean of squared losses per sample)` before
        `step()`. The loss must be bounded below by loss_target (no ELBO); below it, steps stop. No state
        per element, and no schedule needed: keep lr at 1 and tune sigma. Coming from AdamW there is no
        learning rate to carry over.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = KoalaV(layer.parameters(), sigma=0.1)
        >>> loss = layer(torch.ones(1, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.set_loss(loss)
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step']
    """

    title = "KOALA-V"
    paper = "Davtyan et al. 2022, arXiv:2107.03331"
    advice = "Keep lr at 1, start at sigma 0.1, and set loss_target where the loss cannot reach 0."
    batch_scaling = None  # the learning rate alone does not make its steps
    recommended: ClassVar[dict[str, Any]] = {"sigma": 0.1}
    ranges: ClassVar[dict[str, Any]] = {"sigma": ">= 0", "q": ">= 0"}
    inputs = ("loss", "loss_second_moment")
    real_only = "KOALA is not defined for it."

    lr: float = 1.0
    sigma: float = 1.0
    q: float = 1.0
    r: float | None = None
    alpha_r: float = 0.9
    R0: float = 1.0
    weight_decay: float = 0.0
    loss_target: float = 0.0
    wd_in_direction: bool = True

    P = Slot(signed=False, per="optimizer", init=lambda h: h.sigma)  # variance of the weights
    R = Slot(signed=False, per="optimizer", init=lambda h: h.R0)  # variance of the loss

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        refuse_maximize(cls.__name__, options)

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        P = s.P + h.q
        if not given(h.r):
            s.R = loss_variance(s.R, h)
        d, step, H, _ = measure(p, g, h, P, h.r if given(h.r) else s.R)
        s.P = P - P * P * H
        return p - step * P * (d if h.wd_in_direction else g)
