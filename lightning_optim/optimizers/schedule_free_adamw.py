"""Schedule-Free AdamW.  Defazio et al. 2024, arXiv:2405.15682, Algorithm 1 with the denominator of Adam.

As in the authors' program weights are those of the largest rate, decay acts at y, and there is no first moment.
Σw and the largest rate belong to a parameter here, and to a group there, which is the same where all
parameters have gradients. A parameter in 16 bits rounds y after each step, and with it the average
x = (y - (1 - beta) z) / beta.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, ema, minimum, sqrt
from lightning_optim.language.schedule_free import REFUSES, average_of, between, largest_rate, moved, share


class ScheduleFreeAdamW(Optimizer, name="schedule_free_adamw"):
    """AdamW that needs no schedule: it averages its iterates, and takes gradients near the average.

    Formula:
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        γ⁺ₜ = max(γ⁺ₜ₋₁, α)
        wₜ = t^r·γ⁺ₜ^q
        Wₜ = Wₜ₋₁ + wₜ
        dₜ = gₜ / (√(vₜ / (1 − β₂ᵗ)) + ε) + λ·yₜ₋₁
        zₜ = zₜ₋₁ − α·dₜ
        cₜ = wₜ / Wₜ if Wₜ > 0 else 0
        yₜ = yₜ₋₁ + cₜ·(zₜ₋₁ − yₜ₋₁) − α·(1 − β₁·(1 − cₜ))·dₜ
        xₜ = (yₜ − (1 − β₁)·zₜ) / β₁
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay, q = weight_lr_power;
             at the start z₀ = y₀

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size, after the warm-up constant.
        betas: The share of the average in the point at which gradients are taken, in (0, 1), which acts as
            momentum does; and the decay rate of the second moment, in [0, 1).
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: Decoupled weight decay, at the point at which gradients are taken.
        warmup_steps: Number of first steps over which the learning rate rises linearly.
        r: Power of the step counter by which later iterates count more in the average.
        weight_lr_power: Power of the largest learning rate so far by which iterates count in the average: those
            of a warm-up count less. At 0 all count alike.

    Note:
        Start with 1 to 3 times AdamW's learning rate, warm up, and leave out the schedule: one that falls undoes
        the method. The parameter is y while it trains; x is what to evaluate and save. In a Trainer the callback
        `EvaluationWeights` puts it there, and `ConfiguredOptimizer` brings that along. In a loop of your own call
        `eval()` before you evaluate or save, and `train()` before you go on. Checkpoints of schedulefree load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = ScheduleFreeAdamW(layer.parameters(), warmup_steps=10)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # the parameters are the average
        >>> list(optimizer.state[layer.weight])
        ['step', 'z', 'exp_avg_sq', 'weight_sum', 'lr_max', 'raw']
        >>> optimizer.train()
    """

    title = "Schedule-Free AdamW"
    paper = "Defazio et al. 2024, arXiv:2405.15682"
    advice = "1 to 3 times AdamW's learning rate with warmup_steps, and no schedule."
    batch_scaling = "sqrt"
    lr_from_adamw = 2.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2, "warmup_steps": 10}
    ranges: ClassVar[dict[str, Any]] = {
        "betas": ("(0, 1)", "[0, 1)"),
        **dict.fromkeys(("warmup_steps", "r", "weight_lr_power"), ">= 0"),
    }
    letters: ClassVar[dict[str, str]] = {"p": "y", "gamma": "γ", "highest": "γ⁺", "weight_lr_power": "q"}
    own_average = True
    refuses: ClassVar[dict[str, str]] = REFUSES

    lr: float = 2.5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    z = Slot("z", exact=True, copies=True)
    exp_avg_sq = Slot("v", signed=False, mean_square_by="betas.1")
    weight_sum = Slot("W", signed=False, per="tensor")
    lr_max = Slot("γ⁺", signed=False, per="tensor")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        gamma = h.lr * minimum(1.0, t / h.warmup_steps) if h.warmup_steps else h.lr
        return {"gamma": gamma, "later": t**h.r, "c2": 1 - h.betas[1] ** t}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg_sq = v = ema(s.exp_avg_sq, g * g, h.betas[1])
        d = g / (sqrt(v / h.c2) + h.eps) + h.weight_decay * p
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
