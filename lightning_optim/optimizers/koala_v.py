"""KOALA-V: the loss as a Kalman filter's measurement.  Davtyan et al. 2022, arXiv:2107.03331, Algorithm 1.

As in the authors' program each tensor has its own innovation variance S, and the shared variance P shrinks by
the largest of all reductions. Two differences: the decay is a part of the direction, which their program leaves
out (wd_in_direction=False does), and `loss_target` is an addition. Without it lr acts like a target of (1 - lr)
times the loss, as in their program.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Options, Slot, Slots, Value, given
from lightning_optim.language.kalman import REFUSES, loss_variance, measure


class KoalaV(Optimizer, name="koala_v"):
    """KOALA takes steps as long as the loss asks for: long far from its target, and none at the target.

    Formula:
        Rₜ = ρ·Rₜ₋₁ + (1 − ρ)·(L₂ + L₀·(L₀ − 2·L))
        P̄ₜ = Pₜ₋₁ + q
        dₜ = gₜ + λ·θₜ₋₁
        Sₜ = P̄ₜ·‖dₜ‖² + Rₜ
        Pₜ = P̄ₜ − P̄ₜ²·maxₐₗₗ(‖dₜ‖² / Sₜ if ‖gₜ‖² ≥ 10⁻¹⁸ else 0)
        κₜ = α·max(L + 0.5·λ·‖θₜ₋₁‖² − L₀, 0) / Sₜ if ‖gₜ‖² ≥ 10⁻¹⁸ else 0
        θₜ = θₜ₋₁ − κₜ·P̄ₜ·dₜ
        with α = lr, ρ = alpha_r, λ = weight_decay, L₀ = loss_target;
             at the start P₀ = sigma, R₀ = R0;
             L is the loss, L₂ the mean of the samples' squared losses

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Share of the distance to `loss_target` that a step aims to cover; 1 aims at all of it.
        sigma: Initial variance of the weights, at least 0; the authors' script takes 0.1.
        q: What the variance of the weights grows by in each step, at least 0.
        r: Variance of the loss, above 0; null estimates it from the losses.
        alpha_r: Decay rate of that estimate, in [0, 1).
        R0: Initial value of that estimate, above 0.
        weight_decay: L2 penalty, a part of the loss, of the gradient and of the direction.
        loss_target: The loss to reach: 0 where the smallest possible loss is 0.
        wd_in_direction: False leaves the penalty out of the direction of the step, as the authors' program
            does.

    Raises:
        OptionError: for `maximize=True`, which has no meaning here.

    Note:
        Needs the loss: call `step(closure)`, or `set_loss(loss, mean of squared losses per sample)` before
        `step()`. The loss must be bounded below by loss_target (not an ELBO); below it steps stop. No state per
        element and no schedule: keep lr at 1 and tune sigma. AdamW's learning rate does not carry over. Real
        parameters only.

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
    lr_from_adamw = None
    recommended: ClassVar[dict[str, Any]] = {"sigma": 0.1}
    letters: ClassVar[dict[str, str]] = {"prior": "P̄", "step": "κ", "alpha_r": "ρ", "loss_target": "L₀"}
    ranges: ClassVar[dict[str, Any]] = {"sigma": ">= 0", "q": ">= 0"}
    inputs = ("loss", "loss_second_moment")
    real_only = "KOALA is not defined for it."
    refuses: ClassVar[dict[str, str]] = REFUSES

    lr: float = 1.0
    sigma: float = 1.0
    q: float = 1.0
    r: float | None = None
    alpha_r: float = 0.9
    R0: float = 1.0
    weight_decay: float = 0.0
    loss_target: float = 0.0
    wd_in_direction: bool = True

    P = Slot("P", signed=False, per="optimizer", init=lambda h: h.sigma)  # variance of the weights
    R = Slot("R", signed=False, per="optimizer", init=lambda h: h.R0)  # variance of the loss

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        prior = s.P + h.q
        if not given(h.r):
            s.R = loss_variance(s.R, h)
        d, step, H, _ = measure(p, g, h, prior, h.r if given(h.r) else s.R)
        s.P = prior - prior * prior * H
        return p - step * prior * (d if h.wd_in_direction else g)
