"""The schedulers that a schedule becomes in a fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.errors import OptionError
from lightning_optim.training import shapes
from lightning_optim.training.learning_rates import RATES
from lightning_optim.training.lengths import never_ends, timeline_of
from lightning_optim.training.schedules import length_if_known
from lightning_optim.training.shapes import Shape

# Attributes that are no state: what a config says, and who else knows.
OF_CONFIG = ("shape", "current", "momentum")
OTHER_KIND = (
    "The checkpoint has the state of another kind of schedule, and schedule {!r} cannot go on from it. Give the "
    "schedule with which the run began, or begin anew with the weights alone."
)


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    """Multiplies the learning rates that the optimizer began with by a factor of the number of steps.

    An optimizer that loads a checkpoint of another class keeps its own options. A scheduler of torch brings the rates
    of the checkpoint back then; this one takes its place in the schedule alone.

    Args:
        optimizer: The optimizer.
        shape: Its schedule.
        current: The factor after a number of steps.
        momentum: The momentum after a number of steps, or None where the schedule leaves it alone.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shape: Shape,
        current: Callable[[int], float],
        momentum: Callable[[int], float | None] = lambda step: None,
    ) -> None:
        self.shape, self.current, self.momentum = shape, current, momentum
        super().__init__(optimizer)

    @property
    def word(self) -> str:
        """The schedule in a config, such as "cosine"."""
        return self.shape.name

    @property
    def title(self) -> str:
        """The schedule for a reader, such as "cosine after warm-up"."""
        return self.shape.title

    def get_lr(self) -> list[Any]:
        groups = self.optimizer.param_groups
        self.base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in groups]
        momentum = self.momentum(self.last_epoch)
        for group in groups if momentum is not None else ():
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum
        return [rate * self.current(self.last_epoch) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name not in OF_CONFIG}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "base_lrs" not in state_dict:
            raise OptionError(OTHER_KIND.format(self.shape.name))
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        groups, began, last = self.optimizer.param_groups, state_dict["base_lrs"], state_dict["_last_lr"]
        if len(began) != len(groups):  # groups by role go on from one group
            began, last = began[:1] * len(groups), last[:1] * len(groups)
        if RATES in vars(self.optimizer):  # in the middle of a fit, whose rates other factors multiply
            return
        # Not by `current`: the length of training is not known before the loop has gone on where it was.
        for group, first, now in zip(groups, began, last, strict=True):
            rate = group.setdefault("initial_lr", group["lr"])
            set_rate(group, now if rate == first else rate * now / first if first else group["lr"])
        self._last_lr = [group["lr"] for group in groups]

    def begin(self) -> None:
        """Set the first rates, which may depend on the length of training: to be called when training starts."""
        if self.last_epoch == 0:
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                set_rate(group, rate)
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class PlateauScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's ReduceLROnPlateau on the learning rates that the optimizer began with, beside a warm-up.

    All ranks see the mean of their metrics, so that they change their rates together. A checkpoint brings the best
    value, the counters and the factor that has been reached; options are those of the config.

    Args:
        optimizer: The optimizer.
        shape: Its schedule.
    """

    STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "reduction")

    def __init__(self, optimizer: torch.optim.Optimizer, shape: shapes.Plateau) -> None:
        options = ("factor", "mode", "patience", "threshold", "threshold_mode", "cooldown")
        super().__init__(optimizer, **{name: getattr(shape, name) for name in options})
        self.shape = shape
        self.reduction = 1.0
        self.shown = False  # whether a callback has shown the metric of this epoch or step already
        self.warmup: Scheduler | None = None
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def word(self) -> str:
        """The schedule in a config, such as "cosine"."""
        return self.shape.name

    @property
    def title(self) -> str:
        """The schedule for a reader, such as "cosine after warm-up"."""
        return self.shape.title

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]
        if self.shown:
            return
        value = torch.tensor(float(metrics), dtype=torch.float64, device="cpu")
        super().step(float(mean_over_ranks(value)))

    def _reduce_lr(self, epoch: int) -> None:
        self.reduction = max(self.reduction * self.factor, min(self.shape.final, self.reduction))
        factor = self.reduction if self.warmup is None else self.warmup.current(self.warmup.last_epoch)
        self._write(factor)
        if self.warmup is not None:
            self.warmup._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _write(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            set_rate(group, group.setdefault("initial_lr", group["lr"]) * factor)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not all(name in state_dict for name in self.STATE):
            raise OptionError(OTHER_KIND.format(self.shape.name))
        for name in self.STATE:
            setattr(self, name, state_dict[name])
        if self.warmup is None and RATES not in vars(self.optimizer):
            self._write(self.reduction)


def set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set the learning rate of a group, in place where it is a tensor."""
    group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate


def schedulers_for(optimizer: torch.optim.Optimizer, shape: Shape, trainer: Any) -> list[dict[str, Any]]:
    """The schedulers of an optimizer over all steps of a fit, as Lightning takes them.

    There is one, which steps with the optimizer; for a plateau one that steps with the metric, and with a warm-up both.

    Raises:
        OptionError: if the schedule needs the length of training, and the Trainer does not know it, or momentum, and
            the optimizer has none.
    """
    if getattr(shape, "momentum", None) and not {"betas", "momentum"} & optimizer.param_groups[0].keys():
        raise OptionError(
            f"schedule {shape.name!r}: momentum={list(shape.momentum)} cycles momentum or the first of betas, and "  # type: ignore[attr-defined]
            f"{type(optimizer).__name__} has neither. Leave momentum out."
        )
    if not isinstance(shape, shapes.Plateau):
        return [{"scheduler": _by_steps(optimizer, shape, trainer), "interval": "step"}]
    plateau = PlateauScheduler(optimizer, shape)
    by_metric = {
        "scheduler": plateau,
        "interval": shape.interval,
        "frequency": shape.frequency,
        "monitor": shape.monitor,
        "reduce_on_plateau": True,
    }
    if trainer.lightning_module.automatic_optimization:
        from lightning_optim.config.schedule_hooks import ShowMetric  # importing Lightning takes seconds

        trainer.callbacks = [ShowMetric(plateau), *trainer.callbacks]
    if not shape.warmup.amount:
        return [by_metric]
    plateau.warmup = _by_steps(optimizer, shape, trainer, lambda: plateau.reduction)
    return [{"scheduler": plateau.warmup, "interval": "step"}, by_metric]


def _by_steps(
    optimizer: torch.optim.Optimizer, shape: Shape, trainer: Any, others: Callable[[], float] = lambda: 1.0
) -> Scheduler:
    """The scheduler that steps with the optimizer. The factor of another scheduler multiplies its own."""
    timeline = timeline_of(f"schedule {shape.name!r}", trainer)
    begun = shape.warmup.unit == "steps" or shape.name == "one_cycle"  # else step 0 depends on the length of training

    @functools.cache
    def warn_once() -> None:
        if shape.name != "one_cycle":
            _warn_if_too_short(shape, timeline.whole(shape.warmup), length_if_known(trainer), trainer)

    def current(step: int) -> float:
        # The number of steps is read as late as possible. To know it the Trainer sets up the training loader, and
        # before a checkpoint is loaded that loader would start an epoch of which the run is in the middle.
        if not begun:
            return 1.0
        if step and shape.warmup.amount:
            warn_once()
        return shape.at(step, timeline) * others()

    def begin() -> None:
        nonlocal begun
        if not begun:
            begun = True
            scheduler.begin()

    if never_ends(trainer) and shape.needs_end():
        timeline.total()  # it raises
    scheduler = Scheduler(optimizer, shape, current, lambda step: shape.momentum_at(step, timeline))
    if not begun:
        from lightning_optim.config.schedule_hooks import BeginSchedule  # importing Lightning takes seconds

        trainer.callbacks = [BeginSchedule(scheduler, begin), *trainer.callbacks]
    return scheduler


def tell_length(optimizer: Any, trainer: Any) -> None:
    """Tell an optimizer the number of steps of the run, on which its own schedules depend, before its first step.

    Not sooner: as `schedulers_for` says, the Trainer knows it once the loop has gone on where it was.

    Raises:
        OptionError: if the Trainer has no end.
    """
    if never_ends(trainer):
        names = " and ".join(optimizer.lengths)
        raise OptionError(
            f"{type(optimizer).__name__}: {names} can be 'total' where training has an end, and the trainer has "
            "neither max_epochs nor max_steps. Set max_steps, or give a number of steps."
        )

    def tell(*_: Any) -> None:
        optimizer.total_steps = length_if_known(trainer)
        handle.remove()

    handle = optimizer.register_step_pre_hook(tell)


def _warn_if_too_short(shape: Shape, warmup: int, steps: float, trainer: Any) -> None:
    """Warn if training ends during the warm-up."""
    if steps > warmup or vars(trainer).get("fast_dev_run"):
        return
    from lightning.pytorch.utilities import rank_zero_warn  # importing Lightning takes seconds

    in_steps = shape.warmup.unit == "steps"
    written = f"warmup_steps={warmup}" if in_steps else f"warmup={str(shape.warmup)!r}"
    smaller = f"a smaller warmup_steps, such as {int(steps) // 10}" if in_steps else "warmup: 0.1"
    rank_zero_warn(
        f"schedule {shape.name!r}: training has {int(steps)} steps, and {written}. So "
        f"the learning rate ends at {100 * steps / warmup:.3g} % of what was asked for, and the "
        f"schedule is all warm-up. Train longer, or set {smaller}."
    )
