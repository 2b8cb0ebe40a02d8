"""Callbacks that schedulers add to a Trainer for one fit: for what Lightning calls at other moments, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback


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
