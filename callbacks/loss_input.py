"""Pass the loss of each step to optimizers whose update reads it (KOALA)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.core.optimizer import Optimizer


class LossInput(FitCallback):
    """Call `optimizer.set_loss` with the mean loss of the batch of this rank, summed over accumulated batches.

    `ConfiguredOptimizer` adds this callback for an optimizer that needs it. The loss is read where the backward pass
    starts: under gradient accumulation Lightning has divided it there, and the factor of a gradient scaler is removed.
    A module that knows the mean of the squared losses of its samples may call
    `self.optimizers().set_loss(loss, second_moment)` in `training_step`; then the callback does nothing in that step.

    Source: Davtyan et al. 2022, arXiv:2107.03331, for the optimizers.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
        >>> from lightning_optim import KoalaV
        >>> class Model(ManualOptimBoringModel):
        ...     def configure_optimizers(self):
        ...         return KoalaV(self.parameters())
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=1, callbacks=[LossInput()], **options).fit(Model())
        >>> Trainer(fast_dev_run=1, **options).fit(Model())  # its optimizer.step() has no closure
        Traceback (most recent call last):
        ...
        RuntimeError: KoalaV reads the loss, and nobody supplied it. ...

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.LossInput
    """

    @override
    def forget(self) -> None:
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
