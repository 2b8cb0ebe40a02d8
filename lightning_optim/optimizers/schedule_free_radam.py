"""Schedule-Free RAdam.  Defazio et al. 2024, arXiv:2405.15682; Liu et al. 2019, arXiv:1908.03265.

As in the authors' program steps are rectified where rho is above 4, weights are those of the
largest rate, and decay acts at y.
Σw and the largest rate belong to a parameter here, and to a group there, which is the same where all
parameters have gradients. A parameter in 16 bits rounds y after each step, and with it the average
x = (y - (1 - beta) z) / beta.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, sqrt, where
from lightning_optim.language.rectification import rectification, refuse_never_rectified
from lightning_optim.language.schedule_free import REFUSES, average_of, between, largest_rate, moved, share

THRESHOLD = 4.0  # rho above which the variance of the second moment exists


class ScheduleFreeRAdam(Optimizer, name="schedule_free_radam"):
    """RAdam that needs no schedule and no warm-up: it averages its iterates, and takes gradients near the average.

    Formula:
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        ρ∞ = 2 / (1 − β₂) − 1
        ρₜ = ρ∞ − 2·t·β₂ᵗ / (1 − β₂ᵗ)
        γₜ = α·(√((ρₜ − 4)·(ρₜ − 2)·ρ∞ / ((ρ∞ − 4)·(ρ∞ − 2)·ρₜ)) if ρₜ > 4 else 0)
        γ⁺ₜ = max(γ⁺ₜ₋₁, γₜ)
        wₜ = t^r·γ⁺ₜ^q
        Wₜ = Wₜ₋₁ + wₜ
        dₜ = (gₜ / (√(vₜ / (1 − β₂ᵗ)) + ε) if ρₜ > 4 else gₜ) + λ·yₜ₋₁
        zₜ = zₜ₋₁ − γₜ·dₜ
        cₜ = wₜ / Wₜ if Wₜ > 0 else 0
        yₜ = yₜ₋₁ + cₜ·(zₜ₋₁ − yₜ₋₁) − γₜ·(1 − β₁·(1 − cₜ))·dₜ
        xₜ = (yₜ − (1 − β₁)·zₜ) / β₁
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay, q = weight_lr_power;
             at the start z₀ = y₀

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size, which rectification brings up from 0.
        betas: The share of the average in the point at which gradients are taken, in (0, 1), which acts as
            momentum does; and the decay rate of the second moment, in [0, 1).
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: Decoupled weight decay, at the point at which gradients are taken.
        r: Power of the step counter by which later iterates count more in the average.
        weight_lr_power: Power of the largest learning rate so far by which iterates count in the average: the
            first steps count less. At 0 all count alike.
        silent_sgd_phase: Before steps are rectified, only measure the second moment; False takes steps of SGD.

    Raises:
        OptionError: if beta2 is so small that no step would ever be rectified.

    Note:
        Start with 1 to 3 times AdamW's learning rate, and leave out warm-up and schedule: one that falls undoes
        the method. With the default beta2 the first four steps move nothing. The parameter is y while it trains;
        x is what to evaluate and save. In a Trainer the callback `EvaluationWeights` puts it there, and
        `ConfiguredOptimizer` brings that along. In a loop of your own call `eval()` before you evaluate or save,
        and `train()` before you go on. Checkpoints of schedulefree load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = ScheduleFreeRAdam(layer.parameters(), silent_sgd_phase=False)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # the parameters are the average
        >>> list(optimizer.state[layer.weight])
        ['step', 'z', 'exp_avg_sq', 'weight_sum', 'lr_max', 'raw']
        >>> optimizer.train()
    """

    title = "Schedule-Free RAdam"
    paper = "Defazio et al. 2024, arXiv:2405.15682"
    advice = "1 to 3 times AdamW's learning rate, without warm-up and schedule."
    batch_scaling = "sqrt"
    lr_from_adamw = 2.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}
    ranges: ClassVar[dict[str, Any]] = {
        "betas": ("(0, 1)", "[0, 1)"),
        **dict.fromkeys(("r", "weight_lr_power"), ">= 0"),
    }
    letters: ClassVar[dict[str, str]] = {"p": "y", "gamma": "γ", "highest": "γ⁺", "weight_lr_power": "q"}
    own_average = True
    refuses: ClassVar[dict[str, str]] = REFUSES

    lr: float = 2.5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    r: float = 0.0
    weight_lr_power: float = 2.0
    silent_sgd_phase: bool = True

    z = Slot("z", exact=True, copies=True)
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    weight_sum = Slot("W", signed=False, per="tensor")
    lr_max = Slot("γ⁺", signed=False, per="tensor")

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        refuse_never_rectified(cls.__name__, options["betas"][1], THRESHOLD)

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        rectified, r = rectification(h.betas[1], t, THRESHOLD)
        gamma = h.lr * where(rectified, r, 0.0 if h.silent_sgd_phase else 1.0)
        return {"rectified": rectified, "gamma": gamma, "later": t**h.r, "c2": 1 - h.betas[1] ** t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, h.betas[1])
        d = where(h.rectified, g / (sqrt(v / h.c2) + h.eps), g) + h.weight_decay * p
        s.lr_max = highest = largest_rate(s, h.gamma)
        w = h.later * highest**h.weight_lr_power
        s.weight_sum = W = s.weight_sum + w
        c = share(w, W)
        p, s.z = moved(p, s.z, d, c, h.gamma, h.betas[0])
        return p

    @staticmethod
    def evaluate(p: Value, s: Slots, h: Options) -> Value:
        return average_of(p, s.z, h.betas[0])

    @staticmethod
    def resume(p: Value, s: Slots, h: Options) -> Value:
        return between(p, s.z, h.betas[0])
