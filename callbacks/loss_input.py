"""Pass the loss of each step to optimizers whose update reads it (KOALA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.placement import is_sharded


class LossInput(FitCallback):
    """Call `optimizer.set_loss` with the mean loss of the batch of this rank, summed over accumulated batches.

    `ConfiguredOptimizer` adds this callback for an optimizer that needs it. The loss is read where the backward pass
    starts: under gradient accumulation Lightning has divided it there, and the factor of a gradient scaler is removed.
    Of several optimizers each gets the losses that its parameters have gradients of, since these were last zero. Where
    the graph of a loss does not show its parameters, as under FSDP2 or with reentrant checkpointing, the step of such
    an optimizer raises an error that asks for `set_loss`.

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
        self._sums: dict[Optimizer, Tensor] = {}  # of the backward passes whose gradients the next step takes

    @override
    def release(self) -> None:
        super().release()
        self._sums = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.wrap(trainer.strategy, "optimizer_step", self._after_step)  # a gradient scaler may skip the step itself
        for optimizer in _readers(trainer):
            hook = optimizer.register_step_post_hook(lambda stepped, *_: self._forget_sum(stepped))
            self.undo.append(hook.remove)

    def _after_step(self, step: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(optimizer, *args, **kwargs)
        self._forget_sum(optimizer)
        return result

    def _forget_sum(self, optimizer: Any) -> None:
        self._sums.pop(optimizer, None)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        readers = _readers(trainer)
        several = bool(readers) and len(trainer.optimizers) > 1
        leaves = _leaves(loss) if several else set()
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if isinstance(scaler, torch.amp.GradScaler) else 1.0
        for optimizer in readers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if several and not any(id(p) in leaves for p in params):
                continue
            if several and not any(map(_has_gradient, params)):  # they were set to zero since the last backward pass
                self._forget_sum(optimizer)
            self._sums[optimizer] = loss.detach().double() / scale + self._sums.get(optimizer, 0.0)
            if not optimizer.has_second_moment():
                optimizer.set_loss(self._sums[optimizer])


def _readers(trainer: Trainer) -> list[Optimizer]:
    """The optimizers whose update reads the loss."""
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer) and optimizer.inputs]


def _has_gradient(p: Tensor) -> bool:
    return p.grad is not None and (is_sharded(p) or bool(p.grad.any()))


def _leaves(loss: Tensor) -> set[int]:
    """The ids of the tensors that get a gradient from a loss."""
    found: set[int] = set()
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.add(id(node.variable))
    return found
