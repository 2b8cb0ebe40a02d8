"""Factors on the learning rate, as pure functions of the progress of training in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Schedule = Callable[[float, float], float]


def constant(progress: float, final: float) -> float:
    """1 at all times."""
    return 1.0


def linear(progress: float, final: float) -> float:
    """From 1 to `final` in a straight line."""
    return 1 + (final - 1) * progress


def cosine(progress: float, final: float) -> float:
    """From 1 to `final` along half a cosine.  Loshchilov & Hutter 2017, arXiv:1608.03983."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def inverse_sqrt(progress: float, final: float, timescale: float = 0.01) -> float:
    """1 / sqrt(1 + progress / timescale), but at least `final`. It is finite at 0, so it needs no warm-up.

    Args:
        progress: A fraction of training, or a number of steps.
        final: The least factor.
        timescale: The progress at which the factor is 1 / sqrt(2), in the same units.
    """
    return max(final, math.sqrt(timescale / (progress + timescale)))


def flat_linear(progress: float, final: float, fraction: float = 0.2) -> float:
    """1, and then from 1 to `final` in a straight line over the last `fraction` of training."""
    return linear(max(0.0, (progress - (1 - fraction)) / fraction), final)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "flat_linear": flat_linear,
}


def factor(schedule: Schedule, step: int, total: float, warmup: int, final: float) -> float:
    """The factor after `step` steps: a linear warm-up, then the schedule over the remaining steps.

    Args:
        schedule: One of `SCHEDULES`.
        step: Number of steps so far.
        total: Number of steps in the whole training; may be infinite.
        warmup: Number of warm-up steps.
        final: The last factor.

    Example:
        >>> [round(factor(linear, t, 4, 0, 0.0), 2) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> factor(cosine, 1, 100, 4, 0.0)
        0.5
    """
    if step < warmup:
        return (step + 1) / warmup
    return schedule(min((step - warmup) / max(total - warmup, 1), 1.0), final)


def total_steps(trainer: Any) -> float:
    """The number of steps in the whole fit, with those before a resume; infinite if it is unknown.

    The Trainer has an estimate. It is -1 if the loader has no length and only `max_epochs` is set, and it assumes that
    accumulation stays the same, even if a callback changes it between epochs.
    """
    steps = float(trainer.estimated_stepping_batches)
    if steps < 0:
        return math.inf
    batches = trainer.num_training_batches
    changing = [c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")]
    if changing and trainer.max_epochs != -1 and math.isfinite(batches):
        accumulated = [changing[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
        steps = float(sum(math.ceil(batches / count) for count in accumulated))
        return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps
    return steps


def length_if_known(trainer: Any) -> float:
    """The number of steps of each optimizer in the whole fit; infinite where the Trainer does not know it."""
    if not trainer.lightning_module.automatic_optimization:
        return trainer.max_steps if trainer.max_steps != -1 else math.inf  # at most as many
    return math.inf if trainer.max_epochs == -1 and trainer.max_steps == -1 else total_steps(trainer)


def fraction_done(trainer: Any) -> float | None:
    """The fraction of training that will be over at the end of this epoch; None if the length is unknown."""
    fractions = []
    if trainer.max_epochs not in (None, -1):
        fractions.append((trainer.current_epoch + 1) / trainer.max_epochs)
    if trainer.max_steps != -1:
        fractions.append(trainer.global_step / trainer.max_steps)
    return max(fractions, default=None)


def steps_before(trainer: Any, optimizer: Any) -> int:
    """The number of steps that an optimizer has taken in this training up to now, also before a resume.

    It is the optimizer's own step counter where there is one. The Trainer counts the steps of all optimizers together.
    """
    counters = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counters, default=0) or trainer.global_step // max(len(trainer.optimizers), 1)
