"""KOALA-M: KOALA with a velocity in the filter's state.  Davtyan et al. 2022, arXiv:2107.03331, Algorithm 2.

As in the authors' program the process noise q follows a norm that is divided by the number of elements, of the
distance to an average of the weights that starts at zero. Constants are float64 here; their program rounds them
to float32.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import OptionError, Options, Slot, Slots, Value, count, given, norm, where
from lightning_optim.language.kalman import REFUSES, loss_variance, measure

# Shares of the old and the new value in the process noise, and of the weights in their average: the authors' constants.
OLD_NOISE, NEW_NOISE, NEW_WEIGHTS = 0.9, 0.1, 0.1


class KoalaM(Optimizer, name="koala_m"):
    """KOALA with momentum: it predicts where the weights go, measures the loss there, and corrects.

    Formula:
        qₜ = 0.9·qₜ₋₁ + 0.1·‖w̃ₜ₋₁ − wₜ₋₁‖ₐₗₗ / N
        P̄ʷʷₜ = Pʷʷₜ₋₁ + 2·Pʷᵛₜ₋₁ + Pᵛᵛₜ₋₁ + qₜ
        P̄ʷᵛₜ = a·(Pʷᵛₜ₋₁ + Pᵛᵛₜ₋₁)
        P̄ᵛᵛₜ = a²·Pᵛᵛₜ₋₁ + qᵛ
        v̄ₜ = a·vₜ₋₁
        w̄ₜ = wₜ₋₁ + vₜ₋₁
        Rₜ = ρ·Rₜ₋₁ + (1 − ρ)·(L₂ + L₀·(L₀ − 2·L))
        dₜ = gₜ + λ·w̄ₜ
        Sₜ = P̄ʷʷₜ·‖dₜ‖² + Rₜ
        κₜ = α·max(L + 0.5·λ·‖w̄ₜ‖² − L₀, 0) / Sₜ if ‖gₜ‖² ≥ 10⁻¹⁸ else 0
        vₜ = v̄ₜ − κₜ·P̄ʷᵛₜ·dₜ
        w̃ₜ = w̃ₜ₋₁ + (0.1 if ‖gₜ‖² ≥ 10⁻¹⁸ else 0)·(w̄ₜ − κₜ·P̄ʷʷₜ·dₜ − w̃ₜ₋₁)
        Hₜ = maxₐₗₗ(‖dₜ‖² / Sₜ if ‖gₜ‖² ≥ 10⁻¹⁸ else 0)
        Pʷʷₜ = P̄ʷʷₜ − Hₜ·P̄ʷʷₜ²
        Pʷᵛₜ = P̄ʷᵛₜ − Hₜ·P̄ʷʷₜ·P̄ʷᵛₜ
        Pᵛᵛₜ = P̄ᵛᵛₜ − Hₜ·P̄ʷᵛₜ²
        wₜ = w̄ₜ − κₜ·P̄ʷʷₜ·dₜ
        with α = lr, qᵛ = qv, ρ = alpha_r, λ = weight_decay, L₀ = loss_target;
             at the start Pʷʷ₀ = sw, Pʷᵛ₀ = sc, Pᵛᵛ₀ = sv, R₀ = R0, q₀ = qw;
             L is the loss, L₂ the mean of the samples' squared losses, N the number of elements of all tensors

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Share of the distance to `loss_target` that a step aims to cover; 1 aims at all of it.
        sw: Initial variance of the weights, at least 0.
        sc: Initial covariance of weights and velocity; its square is at most `sw * sv`.
        sv: Initial variance of the velocity, at least 0.
        a: Decay rate of the velocity, in [0, 1).
        qw: Initial process noise of the weights, at least 0; it then follows their distance from their average.
        qv: Process noise of the velocity, at least 0.
        r: Variance of the loss, above 0; null estimates it from the losses.
        alpha_r: Decay rate of that estimate, in [0, 1).
        R0: Initial value of that estimate, above 0.
        weight_decay: L2 penalty, a part of the loss, of the gradient and of the direction.
        loss_target: The loss to reach: 0 where the smallest possible loss is 0.

    Raises:
        OptionError: for `maximize=True`, and where `sc` is too large for a covariance.

    Note:
        Call `step(closure)`: the prediction moves the weights before the closure's forward pass. After a
        `step()` without closure the weights stand at the prediction for the next step; the corrected weights
        are then `p - velocity / a`. The loss must be bounded below by loss_target. Real parameters only.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = KoalaM(layer.parameters())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = layer(torch.ones(1, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).shape, list(optimizer.state[layer.weight])
        (torch.Size([]), ['step', 'velocity', 'exp_avg_param'])
    """

    title = "KOALA-M"
    paper = "Davtyan et al. 2022, arXiv:2107.03331"
    advice = "Keep lr at 1, call step with a closure, and set loss_target where the loss cannot reach 0."
    batch_scaling = None  # the learning rate alone does not make its steps
    lr_from_adamw = None
    recommended: ClassVar[dict[str, Any]] = {}
    letters: ClassVar[dict[str, str]] = {"p": "w", "step": "κ", "alpha_r": "ρ", "loss_target": "L₀", "qv": "qᵛ"}
    ranges: ClassVar[dict[str, Any]] = {
        **{"sw": ">= 0", "sc": "any", "sv": ">= 0", "qw": ">= 0", "qv": ">= 0", "a": "[0, 1)"},
    }
    inputs = ("loss", "loss_second_moment")
    real_only = "KOALA is not defined for it."
    refuses: ClassVar[dict[str, str]] = REFUSES

    lr: float = 1.0
    sw: float = 0.1
    sc: float = 0.0
    sv: float = 0.1
    a: float = 0.9
    qw: float = 0.01
    qv: float = 0.01
    r: float | None = None
    alpha_r: float = 0.9
    R0: float = 1.0
    weight_decay: float = 0.0
    loss_target: float = 0.0

    velocity = Slot("v")
    exp_avg_param = Slot("w̃", exact=True)  # it is held against the weights
    P_ww = Slot("Pʷʷ", signed=False, per="optimizer", init=lambda h: h.sw)
    P_wv = Slot("Pʷᵛ", per="optimizer", init=lambda h: h.sc)
    P_vv = Slot("Pᵛᵛ", signed=False, per="optimizer", init=lambda h: h.sv)
    q = Slot("q", signed=False, per="optimizer", init=lambda h: h.qw)
    R = Slot("R", signed=False, per="optimizer", init=lambda h: h.R0)

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if options["sc"] ** 2 > options["sw"] * options["sv"]:
            raise OptionError(f"{cls.__name__}: sc={options['sc']!r} is no covariance; sc² is above sw times sv.")

    @staticmethod
    def predict(p: Value, s: Slots, h: Options) -> Value:
        """Move p by its velocity before the gradient; P: F P F' + diag(q, qv) with F = [[1, 1], [0, a]]."""
        w = norm(s.exp_avg_param - p, over="all") / count(p, over="all")
        s.q = q = OLD_NOISE * s.q + NEW_NOISE * w
        ww, wv, vv = s.P_ww, s.P_wv, s.P_vv
        s.P_ww, s.P_wv, s.P_vv = ww + 2 * wv + vv + q, h.a * (wv + vv), h.a * h.a * vv + h.qv
        v = s.velocity
        s.velocity = h.a * v
        return p + v

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        ww, wv, vv = s.P_ww, s.P_wv, s.P_vv
        if not given(h.r):
            s.R = loss_variance(s.R, h)
        d, step, H, counts = measure(p, g, h, ww, h.r if given(h.r) else s.R)
        p = p - step * ww * d
        s.velocity = s.velocity - step * wv * d
        s.exp_avg_param = s.exp_avg_param + where(counts, NEW_WEIGHTS, 0.0) * (p - s.exp_avg_param)
        s.P_ww, s.P_wv, s.P_vv = ww - H * ww * ww, wv - H * ww * wv, vv - H * wv * wv
        return p
