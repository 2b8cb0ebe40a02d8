"""What happens when a fit asks a LightningModule for its optimizer: what is said then, and what Lightning gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_optim.config import frozen
from lightning_optim.config.scheduler import schedulers_for, tell_length
from lightning_optim.core import routing
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.training.shapes import Shape

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule


def configure(
    module: LightningModule,
    optimizer: torch.optim.Optimizer,
    word: str,
    companions: Sequence[Callback],
    schedule: Shape | None,
) -> Any:
    """The return value of `configure_optimizers`: the optimizer, with a scheduler if there is a schedule.

    It says which parameters have no state and how others are served, and warns of companions that the Trainer lacks.

    Args:
        module: The module, in a Trainer.
        optimizer: Its optimizer.
        word: The name of the optimizer in the spec.
        companions: The callbacks that the optimizer comes with.
        schedule: The schedule of the spec.
    """
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

    if left_out := list(frozen.frozen_parameters(module)):
        joining = (
            "They join it when they get requires_grad_(True)."
            if isinstance(optimizer, Optimizer)
            else "To train them later, add them by add_param_group, as Lightning's BaseFinetuning does."
        )
        some = frozen.some_of(left_out)
        rank_zero_info(f"{type(optimizer).__name__} keeps no state for frozen parameters: {some}. {joining}")
    if isinstance(optimizer, Optimizer) and (report := routing.report(optimizer)):
        rank_zero_info("\n".join([f"{type(optimizer).__name__}:", *report]))
    if spared := _spared(optimizer):
        rank_zero_info(
            f"{word}: weight_decay={optimizer.defaults['weight_decay']} leaves out {spared} parameters: biases and "
            "norms, if no_decay says nothing else. no_decay: [] lets all decay."
        )
    present = module.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for companion in companions:
        if not any(isinstance(callback, type(companion)) for callback in present):
            title = type(companion).__name__
            if isinstance(optimizer, Optimizer):
                optimizer.told = optimizer.told or hasattr(companion, "serves_evaluation")
            rank_zero_warn(
                f"optimizer {word!r} comes with the callback {title}, which the Trainer does not have, so it "
                f"trains without. Add lightning_optim.callbacks.{title} to the Trainer, or return the callbacks of "
                "the strategy from configure_callbacks, as ConfiguredOptimizer does."
            )
    lengths = optimizer.lengths if isinstance(optimizer, Optimizer) else ()
    if any(group[name] == "total" for group in optimizer.param_groups for name in lengths):
        tell_length(optimizer, module.trainer)
    if schedule is None:
        return optimizer
    configs = schedulers_for(optimizer, schedule, module.trainer)
    return {"optimizer": optimizer, "lr_scheduler": configs[0]} if len(configs) == 1 else ([optimizer], configs)


def _spared(optimizer: torch.optim.Optimizer) -> int:
    """How many parameters a foreign optimizer does not decay, which it would if it were made by hand."""
    if isinstance(optimizer, Optimizer) or not optimizer.defaults.get("weight_decay"):
        return 0
    return sum(len(group["params"]) for group in optimizer.param_groups if not group["weight_decay"])
