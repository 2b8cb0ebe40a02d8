"""Skip steps whose gradients are not finite, on all ranks alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.distributed.names import named_parameters
from lightning_optim.distributed.placement import drop_gradients, values_of
from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.errors import OptionError, is_whole


class NonFiniteGuard(FitCallback):
    """Skip the step, or raise an error, on all ranks if a gradient on any rank contains NaN or infinity.

    Under DDP a gradient that is not finite is on all ranks after the all-reduce; under FSDP it may be in the shard of
    one. So the ranks all-reduce one number in each step. In a skipped step the gradients are removed. Weights, state,
    step counters and stages do not change, for our optimizers and for torch's. The Trainer counts the step in
    `global_step` and steps the scheduler, as it does when a gradient scaler skips.

    Add it before callbacks that read gradients. The number of skipped steps is logged as
    `non_finite_guard/skipped_steps`.

    Args:
        action: "skip" the step, or "raise" an error.
        patience: Number of consecutive skips after which an error is raised, at least 1; None for no limit. Weights
            that are not finite never recover.

    Attributes:
        skipped: Number of skipped steps in the last fit, with those before a resume.
        in_a_row: Number of consecutive skipped steps up to now.

    Raises:
        OptionError: if an option is out of range; at the start of the fit, for "raise" with a gradient scaler, which
            finds its scale by overflows.
        FloatingPointError: during training, for `action="raise"`, or after `patience` consecutive skips.

    Example:
        >>> import warnings
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Model(BoringModel):
        ...     def training_step(self, batch, batch_idx):
        ...         loss = super().training_step(batch, batch_idx)["loss"]
        ...         return loss * math.nan if batch_idx == 1 else loss
        >>> model, guard = Model(), NonFiniteGuard()
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     Trainer(fast_dev_run=3, callbacks=[guard], **options).fit(model)
        >>> [str(w.message) for w in caught if "Guard" in str(w.message)]
        ['NonFiniteGuard skips step 1: the gradient of layer.weight is not finite.']
        >>> guard.skipped, bool(model.layer.weight.isfinite().all())
        (1, True)

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.NonFiniteGuard
                  init_args: {patience: 3}
    """

    def __init__(self, action: Literal["skip", "raise"] = "skip", patience: int | None = 10) -> None:
        super().__init__()
        errors.check_choice("NonFiniteGuard", "action", action, ["skip", "raise"])
        whole = patience is None or is_whole(patience)
        errors.check("NonFiniteGuard", "patience", patience, whole, "an integer of at least 1, or None")
        self.action, self.patience = action, None if patience is None else int(patience)

    @override
    def forget(self) -> None:
        self.skipped = 0
        self.in_a_row = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.action == "raise" and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise OptionError(
                "NonFiniteGuard: action='raise' would end the training at the first overflow, and a gradient scaler "
                "finds its scale by overflows. Use action='skip', whose patience bounds them."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        bad = torch.tensor(float(not all_finite(params)), dtype=torch.float32, device=trainer.strategy.root_device)
        if not mean_over_ranks(bad).item():
            self.in_a_row = 0
            return
        where = f"step {trainer.global_step}: {_first_bad(pl_module)}"
        if self.action == "raise":
            raise FloatingPointError(f"NonFiniteGuard: {where}.")
        drop_gradients(params)
        self.skipped += 1
        self.in_a_row += 1
        for logger in trainer.loggers if trainer.log_every_n_steps else ():  # type: ignore[attr-defined]
            logger.log_metrics({"non_finite_guard/skipped_steps": float(self.skipped)}, trainer.global_step)
        if self.in_a_row == self.patience:
            raise FloatingPointError(
                f"NonFiniteGuard: {self.in_a_row} steps in a row were skipped, the last at {where}. Do the weights "
                "hold NaN already, or is the learning rate too large? Resume from an earlier checkpoint."
            )
        rank_zero_warn(f"NonFiniteGuard skips {where}.")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def all_finite(params: Iterable[Tensor]) -> bool:
    """Whether all gradients, or the shards of them on this rank, are finite."""
    shards = [values_of(p.grad) for p in params if p.grad is not None]
    shards = [shard for shard in shards if shard.numel()]
    # On a CPU the Euclidean norm is thirty times as fast as the maximum, but it may overflow for finite elements.
    return any(_all_norms_finite(shards, order) for order in (2.0, math.inf))


def _all_norms_finite(shards: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(shards, order) if shards else []  # pyright: ignore[reportPrivateImportUsage]
    stackable: dict[Any, list[Tensor]] = {}
    for norm in norms:
        stackable.setdefault((norm.device, norm.dtype), []).append(norm)
    return all(bool(torch.stack(same).isfinite().all()) for same in stackable.values())


def _first_bad(module: LightningModule) -> str:
    for name, p in named_parameters(module):
        if not all_finite([p]):
            return f"the gradient of {name} is not finite"
    return "another rank has a gradient that is not finite"
