"""Schedule-Free SGD.  Defazio et al. 2024, arXiv:2405.15682, Algorithm 1.

As in the authors' program weights are those of the largest rate, and decay acts at y.
Σw and the largest rate belong to a parameter here, and to a group there, which is the same where all
parameters have gradients. A parameter in 16 bits rounds y after each step, and with it the average
x = (y - (1 - beta) z) / beta.
"""

from typing import Any, ClassVar

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language import Operand, Options, Slot, Slots, Value, minimum
from lightning_optim.language.schedule_free import REFUSES, average_of, between, largest_rate, moved, share


class ScheduleFreeSGD(Optimizer, name="schedule_free_sgd"):
    """SGD that needs no schedule: it averages its iterates, and takes gradients near the average.

    Formula:
        γ⁺ₜ = max(γ⁺ₜ₋₁, α)
        wₜ = t^r·γ⁺ₜ^q
        Wₜ = Wₜ₋₁ + wₜ
        dₜ = gₜ + λ·yₜ₋₁
        zₜ = zₜ₋₁ − α·dₜ
        cₜ = wₜ / Wₜ if Wₜ > 0 else 0
        yₜ = yₜ₋₁ + cₜ·(zₜ₋₁ − yₜ₋₁) − α·(1 − β·(1 − cₜ))·dₜ
        xₜ = (yₜ − (1 − β)·zₜ) / β
        with α = lr, β = momentum, λ = weight_decay, q = weight_lr_power;
             at the start z₀ = y₀

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size, after the warm-up constant.
        momentum: The share of the average in the point at which gradients are taken, in (0, 1), which acts as
            momentum does.
        weight_decay: Weight decay, at the point at which gradients are taken.
        warmup_steps: Number of first steps over which the learning rate rises linearly.
        r: Power of the step counter by which later iterates count more in the average.
        weight_lr_power: Power of the largest learning rate so far by which iterates count in the average: those
            of a warm-up count less. At 0 all count alike.

    Note:
        Start with 10 times SGD's learning rate or more, and leave out the schedule: one that falls undoes the method.
        The parameter is y while it trains; x is what to evaluate and save. In a Trainer the callback
        `EvaluationWeights` puts it there, and `ConfiguredOptimizer` brings that along. In a loop of your own call
        `eval()` before you evaluate or save, and `train()` before you go on. Checkpoints of schedulefree load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = ScheduleFreeSGD(layer.parameters(), warmup_steps=10)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # the parameters are the average
        >>> list(optimizer.state[layer.weight])
        ['step', 'z', 'weight_sum', 'lr_max', 'raw']
        >>> optimizer.train()
    """

    title = "Schedule-Free SGD"
    paper = "Defazio et al. 2024, arXiv:2405.15682"
    advice = "10 to 50 times SGD's learning rate with warmup_steps, and no schedule."
    batch_scaling = "linear"
    lr_from_adamw = 300.0
    recommended: ClassVar[dict[str, Any]] = {"lr": 0.3, "warmup_steps": 10}
    ranges: ClassVar[dict[str, Any]] = {
        "momentum": "(0, 1)",
        **dict.fromkeys(("warmup_steps", "r", "weight_lr_power"), ">= 0"),
    }
    letters: ClassVar[dict[str, str]] = {
        "p": "y",
        "momentum": "β",
        "gamma": "γ",
        "highest": "γ⁺",
        "weight_lr_power": "q",
    }
    own_average = True
    refuses: ClassVar[dict[str, str]] = REFUSES

    lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    z = Slot("z", exact=True, copies=True)
    weight_sum = Slot("W", signed=False, per="tensor")
    lr_max = Slot("γ⁺", signed=False, per="tensor")

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        gamma = h.lr * minimum(1.0, t / h.warmup_steps) if h.warmup_steps else h.lr
        return {"gamma": gamma, "later": t**h.r}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        d = g + h.weight_decay * p
        s.lr_max = highest = largest_rate(s, h.gamma)
        w = h.later * highest**h.weight_lr_power
        s.weight_sum = W = s.weight_sum + w
        c = share(w, W)
        p, s.z = moved(p, s.z, d, c, h.gamma, h.momentum)
        return p

    @staticmethod
    def evaluate(p: Value, s: Slots, h: Options) -> Value:
        return average_of(p, s.z, h.momentum)

    @staticmethod
    def resume(p: Value, s: Slots, h: Options) -> Value:
        return between(p, s.z, h.momentum)
