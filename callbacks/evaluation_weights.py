"""Evaluate and save the weights that an optimizer says, and not those at which it takes gradients.

Defazio et al. 2024, arXiv:2405.15682, for the optimizers.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_optim.callbacks.swapped_statistics import SwappedStatistics
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.placement import reshard


class EvaluationWeights(SwappedStatistics):
    """Put the weights to evaluate into the model for validation, for checkpoints and at the end of the fit.

    It is for optimizers that take gradients at other weights than those to evaluate: the Schedule-Free ones, whose
    average is evaluated. `ConfiguredOptimizer` adds it for them. In validation, in every checkpoint, also with
    `save_weights_only`, after the fit and after an exception the model has the weights to evaluate. Those of training
    are in the slot `raw` of the optimizer meanwhile, from where they come back bit for bit; a fit that resumes from a
    checkpoint goes on with them. `raw` takes 4 bytes for each value, and there is none during training.

    Source: Defazio et al. 2024, arXiv:2405.15682, for the optimizers.

    Args:
        batch_norm: "recompute" runs `training_step` over training batches before other weights are evaluated, since the
            running statistics belong to those of training; "keep" does not. Layers in eval mode keep theirs. Models
            without batch normalization are not affected.
        batch_norm_batches: Number of training batches for that. Default: as many as the longest epoch so far has had.

    Raises:
        OptionError: if an option is out of range; at the start of the fit, if another callback also chooses the weights
            to evaluate, or if the training loader cannot give batches for `batch_norm`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim import ScheduleFreeAdamW
        >>> class Model(BoringModel):
        ...     def configure_optimizers(self):
        ...         return ScheduleFreeAdamW(self.parameters())
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer, model = Trainer(fast_dev_run=3, callbacks=[EvaluationWeights()], **options), Model()
        >>> trainer.fit(model)
        >>> trainer.optimizers[0].is_training  # the model has the average
        False

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.EvaluationWeights
    """

    slot = "raw"
    serves_evaluation = True  # by which an optimizer finds it

    def __init__(
        self, batch_norm: Literal["recompute", "keep"] = "recompute", batch_norm_batches: int | None = None
    ) -> None:
        super().__init__(batch_norm, batch_norm_batches)

    @override
    def forget(self) -> None:
        super().forget()
        self.swaps = False  # until it has found an optimizer to serve
        self._served: dict[int, Optimizer] = {}  # by their index
        self._rates: dict[Optimizer, list[float]] = {}  # the rates of the step before
        self._told = False  # that a rate falls

    # ------------------------------------------------------------------ hooks

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = enumerate(trainer.optimizers)
        self._served = {i: one for i, one in every if isinstance(one, Optimizer) and one.evaluates()}
        self.swaps = bool(self._served)
        if not self.swaps:
            titles = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            rank_zero_warn(f"EvaluationWeights has nothing to do: {titles} evaluates the weights of training.")
        self.begin(trainer, pl_module)
        self.restore_counters()

    @override
    def refuse_own_average(self, trainer: Trainer) -> None:
        """It brings such an average into the model itself."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        averaging = [] if self._told else [optimizer for optimizer in self._served.values() if optimizer.own_average]
        for optimizer in averaging:
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            before = self._rates.get(optimizer, rates)
            if any(rate < last for rate, last in zip(rates, before, strict=False)):
                self._told = True
                rank_zero_warn(
                    f"A schedule brings the learning rate of {type(optimizer).__name__} down, which its average is to "
                    "replace. Steps are shorter then, and each counts in the average as one of the largest rate so "
                    "far. Keep the rate constant after a warm-up."
                )
            self._rates[optimizer] = rates

    @override
    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap_in(trainer, pl_module)

    @override
    def release(self) -> None:
        super().release()
        self._served, self._rates = {}, {}

    # ------------------------------------------------------------------ swapping

    @property
    def active(self) -> bool:
        return bool(self._served)

    @override
    def ready(self, i: int) -> bool:
        return i in self._served

    @override
    def version(self, trainer: Trainer) -> int:
        return trainer.global_step

    @override
    def look(self, trainer: Trainer) -> None:
        """The optimizers know: one may have been loaded in evaluation mode, and users may change the mode."""
        self.swapped = any(not optimizer.is_training for optimizer in self._served.values())

    @override
    def swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:  # until then all weights are the same
            super().swap_in(trainer, pl_module)

    @override
    def swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seal = {}  # the optimizer finds out itself, and goes on from what was written
        super().swap_out(trainer, pl_module)

    @override
    def _swap(self, trainer: Trainer) -> None:
        """Change the mode of the optimizers. No rank needs another for it."""
        reshard(trainer.strategy.model)
        for optimizer in self._served.values():
            if self.swapped:
                optimizer.train()
            else:
                optimizer.eval()
