"""The base of callbacks that add a stage to every optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.core.foreign_stages import attach
from lightning_optim.stages.stage import Stage
from lightning_optim.training.schedules import steps_before


class StageCallback(FitCallback):
    """Attaches one stage to each optimizer for the length of a fit, and restores the counters of a checkpoint.

    The slots of a stage are optimizer state, so they are saved with the optimizer. Only counters are saved here. A
    stage whose callback joins a training that has run without it counts the steps from the beginning too.
    """

    @override
    def forget(self) -> None:
        self._stages: list[Any] = []
        self._state: Mapping[str, Any] = {}  # of a checkpoint, until there are stages; of a fit, when it is over
        self._joins = True  # no counters were loaded

    def stages_for(self, optimizers: Sequence[torch.optim.Optimizer]) -> Sequence[Stage]:
        """Stages with the slots that a fit adds, one for each optimizer; none where it adds no slot."""
        return ()

    def attach(self, trainer: Trainer, stages: Sequence[Stage]) -> None:
        """Attach a stage to each optimizer. Call this in `on_fit_start`, and `restore_counters` after it.

        Args:
            trainer: The Trainer.
            stages: The stages, one for each optimizer and in their order.
        """
        self._stages = []
        for stage, optimizer in zip(stages, trainer.optimizers, strict=True):
            self.undo.append(attach(stage, optimizer))
            self._stages.append(stage)

    @override
    def release(self) -> None:
        if self.active:
            self._state = self.counters()
            self._stages = []
        super().release()

    @property
    def active(self) -> bool:
        """Whether it takes part in the fit of now."""
        return bool(self._stages)

    # ------------------------------------------------------------------ counters

    def counters(self) -> dict[str, Any]:
        """What `state_dict` returns during a fit."""
        return {"steps": [stage.steps for stage in self._stages]}

    def set_counters(self, state: Mapping[str, Any]) -> None:
        """Set the counters of the stages from what `counters` returned."""
        for stage, steps in zip(self._stages, state["steps"], strict=True):
            stage.steps = steps

    def restore_counters(self) -> None:
        """Set the counters of a loaded checkpoint, once there are stages.

        In one process and under DDP callbacks are loaded before the optimizers exist, under FSDP after that.
        """
        if self._state and self.active:
            self.set_counters(self._state)
            self._state, self._joins = {}, False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._joins and self._stages:
            for stage, optimizer in zip(self._stages, trainer.optimizers, strict=True):
                stage.steps = steps_before(trainer, optimizer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.counters() if self.active else dict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
        self.restore_counters()
