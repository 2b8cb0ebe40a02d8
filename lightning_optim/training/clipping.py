"""Gradient clipping as the Trainer configures it, by norm under FSDP1 as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from lightning_optim.distributed.clipping import clip_gradient_norm
from lightning_optim.distributed.fsdp1 import is_flattened

# To a type checker a mixin is the module that it is mixed into. At run time it is a class of its own: importing
# Lightning takes seconds.
if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
else:
    LightningModule = object


class GradientClipping(LightningModule):
    """A mixin for a LightningModule: gradient clipping by norm that also works under FSDP1.

    List it before `LightningModule` among the base classes.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as `Trainer(gradient_clip_val=...)` says, also by norm under FSDP1, which Lightning does not support."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        by_norm = gradient_clip_algorithm in (None, "norm")
        if gradient_clip_val and by_norm and any(is_flattened(p) for p in params):
            clip_gradient_norm(params, float(gradient_clip_val))
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
