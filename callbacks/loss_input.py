"""Hand the loss of each step to optimizers whose update reads it (KOALA)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_optim.core.optimizer import Optimizer


class LossInput(Callback):
    """Calls `optimizer.set_loss` with the mean loss of the batch of this rank, summed over accumulated batches.

    It comes by itself with an optimizer that needs it. The loss is taken where it enters the backward pass, so it is
    right under gradient accumulation (whose parts Lightning has divided already) and without the factor of a
    gradient scaler. A module that knows the mean of the squared losses of its samples may call
    `self.optimizers().set_loss(loss, second_moment)` in `training_step`; then this callback leaves that step alone.
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._step = -1

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step != self._step:
            self._sum, self._step = 0.0, trainer.global_step
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if isinstance(scaler, torch.amp.GradScaler) else 1.0
        self._sum = self._sum + loss.detach().double() / scale
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Optimizer) and optimizer.inputs and not optimizer.has_second_moment():
                optimizer.set_loss(self._sum)
