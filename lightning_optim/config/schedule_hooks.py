"""Callbacks that schedulers add to a Trainer for one fit: for what Lightning calls at other moments, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn


class ForOneFit(Callback):
    """Serves a scheduler as long as it is one of the fit; a trial of a tuner has its own.

    Args:
        scheduler: The scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def serves(self, trainer: Any) -> bool:
        return any(config.scheduler is self.scheduler for config in trainer.lr_scheduler_configs)

    def leave(self, trainer: Any) -> None:
        """Leave the Trainer. Its list is replaced, for it may be walking over it."""
        trainer.callbacks = [other for other in trainer.callbacks if other is not self]


class BeginSchedule(ForOneFit):
    """Calls a function when training starts, before other callbacks read learning rates."""

    def __init__(self, scheduler: Any, begin: Callable[[], None]) -> None:
        super().__init__(scheduler)
        self.begin = begin

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.serves(trainer):
            self.leave(trainer)
            self.begin()


class ShowMetric(ForOneFit):
    """Shows a plateau its metric as soon as it is there, and so before a checkpoint is saved.

    Lightning does so after it has saved, and not at all in an epoch in which a run was resumed. Such a run would miss
    a value. What Lightning shows later is then left out.
    """

    seen: Any = None  # the last value
    steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.serves(trainer) and (why := self._without_value(trainer)):
            word = self.scheduler.shape.monitor
            rank_zero_warn(
                f"schedule 'plateau' monitors {word!r}, and {why} Unless training logs {word!r} too, this fit ends "
                "with an error when the metric is read."
            )

    def _without_value(self, trainer: Any) -> str:
        """Why a metric of validation will not be there when it is read, and what to do; empty where it will."""
        shape, every = self.scheduler.shape, trainer.check_val_every_n_epoch
        if not shape.monitor.startswith("val"):
            return ""
        if not trainer.enable_validation:
            return (
                "this fit has no validation: there is no validation_step, no validation loader, or "
                "limit_val_batches=0. Add validation, or monitor a metric of training."
            )
        if shape.interval == "epoch" and every is not None and shape.frequency % every:
            return f"validation runs every {every} epochs (check_val_every_n_epoch). Write frequency: {every} there."
        return ""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.scheduler.shown = False

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = trainer.callback_metrics.get(self.scheduler.shape.monitor)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_last_batch and not trainer.sanity_checking:
            self._show(trainer, "epoch", trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._show(trainer, "epoch", trainer.current_epoch + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        moved, self.steps = trainer.global_step > self.steps, trainer.global_step
        if self.scheduler.shape.interval == "step" and moved:
            self.scheduler.shown = False
            self._show(trainer, "step", batch_idx + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.serves(trainer):
            self.leave(trainer)

    def _show(self, trainer: Any, interval: str, count: int) -> None:
        shape, value = self.scheduler.shape, trainer.callback_metrics.get(self.scheduler.shape.monitor)
        due = shape.interval == interval and count % shape.frequency == 0 and not self.scheduler.shown
        if due and value is not None and value is not self.seen and self.serves(trainer):
            self.seen = value
            self.scheduler.step(value)
            self.scheduler.shown = True
