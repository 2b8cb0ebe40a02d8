"""The base of callbacks that add a stage to every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_optim.core.foreign_stages import attach
from lightning_optim.stages.stage import Stage


class StageCallback(Callback):
    """Attaches one stage to each optimizer for the length of a fit, and restores the counters of a checkpoint.

    The slots of a stage are optimizer state, so they are saved with the optimizer. Only counters are saved here.
    """

    def __init__(self) -> None:
        self._stages: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._loaded: dict[str, Any] | None = None

    def attach(self, trainer: Trainer, stages: Sequence[Stage]) -> None:
        """Attach a stage to each optimizer. Call this in `on_fit_start`, and `restore_counters` after it.

        Args:
            trainer: The Trainer.
            stages: The stages, one for each optimizer and in their order.
        """
        self._stages = []
        for stage, optimizer in zip(stages, trainer.optimizers, strict=True):
            self._undo.append(attach(stage, optimizer))
            self._stages.append(stage)

    def set_counters(self, state: Mapping[str, Any]) -> None:
        """Set the counters of the stages from what `state_dict` returned."""
        for stage, steps in zip(self._stages, state["steps"], strict=True):
            stage.steps = steps

    def restore_counters(self) -> None:
        """Set the counters of a loaded checkpoint, once there are stages.

        In one process and under DDP callbacks are loaded before the optimizers exist, under FSDP after that.
        """
        if self._loaded is not None and self._stages:
            self.set_counters(self._loaded)
            self._loaded = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._undo:
            self._undo.pop()()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self.restore_counters()
