"""The schedule of a config: how it is written, and the scheduler that it becomes."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_optim.config.groups import Split
from lightning_optim.errors import OptionError, is_number, is_whole, nearest, shown
from lightning_optim.training.learning_rates import RATES
from lightning_optim.training.schedules import SCHEDULES, factor, length_if_known, total_steps


class Schedule(NamedTuple):
    """A schedule of the learning rate.

    Attributes:
        name: One of `SCHEDULES`.
        warmup_steps: Number of steps of a linear warm-up.
        final: The last factor on the learning rate.
    """

    name: str
    warmup_steps: int = 0
    final: float = 0.0


def read(spec: Any) -> Schedule | None:
    """Read a word, a mapping with `name`, `warmup_steps` and `final`, or None.

    Raises:
        OptionError: for an unknown schedule or option, or a value out of range.

    Example:
        >>> read({"name": "cosine", "warmup_steps": 100})
        Schedule(name='cosine', warmup_steps=100, final=0.0)
    """
    if spec is None:
        return None
    options = Schedule._fields
    if not isinstance(spec, str | Mapping):
        raise OptionError(
            f"schedule={shown(spec)} must be one of {', '.join(SCHEDULES)}, or a mapping with {', '.join(options)}."
        )
    given: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    for key in given:
        if key not in options:
            hint = nearest(key, options)
            raise OptionError(f"schedule has no option {shown(key)}.{hint} Its options are {', '.join(options)}.")
    if "name" not in given:
        raise OptionError(f"schedule={shown(spec)} has no 'name': one of {', '.join(SCHEDULES)}.")
    schedule = Schedule(**given)
    if not isinstance(schedule.name, str) or schedule.name not in SCHEDULES:
        hint = nearest(shown(schedule.name), SCHEDULES)
        raise OptionError(f"schedule {shown(schedule.name)} is not one of {', '.join(SCHEDULES)}.{hint}")
    if not is_whole(schedule.warmup_steps, least=0):
        raise OptionError(f"schedule: warmup_steps={shown(schedule.warmup_steps)} must be an integer of at least 0.")
    if not is_number(schedule.final) or not 0 <= schedule.final <= sys.float_info.max:
        raise OptionError(f"schedule: final={shown(schedule.final)} must be a number of at least 0.")
    return Schedule(str(schedule.name), int(schedule.warmup_steps), float(schedule.final))


def refuse_beside_average(
    owner: str, schedule: Schedule | None, options: Mapping[str, Any], groups: Sequence[Split]
) -> None:
    """Refuse a schedule that falls, or a second warm-up, beside an optimizer that averages its iterates instead.

    Args:
        owner: The optimizer, for the message.
        schedule: The schedule, if there is one.
        options: The options of the optimizer.
        groups: The parameter groups of the user.

    Raises:
        OptionError: for such a schedule.
    """
    if schedule is not None and schedule.name != "constant":
        raise OptionError(
            f"{owner} averages its iterates instead of a schedule, and schedule {schedule.name!r} would undo that. "
            "Leave schedule out, or write {name: constant, warmup_steps: ...} for a warm-up."
        )
    of_groups = [(group.options.get("warmup_steps", 0), f" of group {group.label!r}") for group in groups]
    for steps, where in [(options.get("warmup_steps", 0), ""), *of_groups]:
        if steps and schedule is not None and schedule.warmup_steps:
            raise OptionError(
                f"{owner}: warmup_steps={int(steps)}{where} and warmup_steps={schedule.warmup_steps} of the schedule "
                "would multiply. Keep one of the two."
            )


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    """Multiplies the learning rates that the optimizer began with by a factor of the number of steps.

    An optimizer that loads a checkpoint of another class keeps its own options. A scheduler of torch brings the rates
    of the checkpoint back then; this one takes its place in the schedule alone.

    Args:
        optimizer: The optimizer.
        current: The factor after a number of steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, current: Callable[[int], float]) -> None:
        self.current = current
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        self.base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        return [rate * self.current(self.last_epoch) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "current"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        groups, began, last = self.optimizer.param_groups, state_dict["base_lrs"], state_dict["_last_lr"]
        if len(began) != len(groups):  # groups by role go on from one group
            began, last = began[:1] * len(groups), last[:1] * len(groups)
        if RATES in vars(self.optimizer):  # in the middle of a fit, whose rates other factors multiply
            return
        # Not by `current`: the length of training is not known before the loop has gone on where it was.
        for group, first, now in zip(groups, began, last, strict=True):
            rate = group.setdefault("initial_lr", group["lr"])
            value = now if rate == first else rate * now / first if first else group["lr"]
            group["lr"] = group["lr"].fill_(value) if isinstance(group["lr"], torch.Tensor) else value
        self._last_lr = [group["lr"] for group in groups]


def scheduler_for(optimizer: torch.optim.Optimizer, schedule: Schedule, trainer: Any) -> Scheduler:
    """A scheduler over all steps of a fit.

    Raises:
        OptionError: if the schedule needs the length of training, and the Trainer does not know it.
    """
    shape, warmup, final = schedule
    unbounded = shape != "constant" and trainer.max_epochs == -1 and trainer.max_steps == -1

    @functools.cache
    def total() -> float:
        steps = math.inf if unbounded else total_steps(trainer)
        if not math.isfinite(steps):
            raise OptionError(
                f"schedule {shape!r} needs to know how long training is: the trainer has neither max_epochs nor "
                "max_steps, or an epoch has no length. Set max_steps."
            )
        return steps

    @functools.cache
    def warn_once() -> None:
        if trainer.max_steps == -1 or trainer.max_steps > warmup:
            _warn_if_too_short(schedule, length_if_known(trainer), trainer)

    def current(step: int) -> float:
        # The number of steps is read as late as possible. To know it the Trainer sets up the training loader, and
        # before a checkpoint is loaded that loader would start an epoch of which the run is in the middle.
        if 0 < step <= warmup:
            warn_once()
        steps = total() if step > warmup and shape != "constant" else math.inf
        return factor(SCHEDULES[shape], step, steps, warmup, final)

    if unbounded:
        total()
    if 0 < trainer.max_steps <= warmup:
        _warn_if_too_short(schedule, trainer.max_steps, trainer)
    return Scheduler(optimizer, current)


def tell_length(optimizer: Any, trainer: Any) -> None:
    """Tell an optimizer the number of steps of the run, on which its own schedules depend, before its first step.

    Not sooner: as `scheduler_for` says, the Trainer knows it once the loop has gone on where it was.

    Raises:
        OptionError: if the Trainer has no end.
    """
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        names = " and ".join(optimizer.lengths)
        raise OptionError(
            f"{type(optimizer).__name__}: {names} can be 'total' where training has an end, and the trainer has "
            "neither max_epochs nor max_steps. Set max_steps, or give a number of steps."
        )

    def tell(*_: Any) -> None:
        optimizer.total_steps = length_if_known(trainer)
        handle.remove()

    handle = optimizer.register_step_pre_hook(tell)


def _warn_if_too_short(schedule: Schedule, steps: float, trainer: Any) -> None:
    """Warn if training ends during the warm-up."""
    if steps > schedule.warmup_steps or vars(trainer).get("fast_dev_run"):
        return
    from lightning.pytorch.utilities import rank_zero_warn  # importing Lightning takes seconds

    rank_zero_warn(
        f"schedule {schedule.name!r}: training has {int(steps)} steps, and warmup_steps={schedule.warmup_steps}. So "
        f"the learning rate ends at {100 * steps / schedule.warmup_steps:.3g} % of what was asked for, and the "
        f"schedule is all warm-up. Train longer, or set a smaller warmup_steps, such as {int(steps) // 10}."
    )
