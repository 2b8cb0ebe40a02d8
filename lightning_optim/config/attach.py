"""An optimizer for a LightningModule that exists already."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from lightning_optim.config import freezing
from lightning_optim.config.mixin import ConfiguredOptimizer
from lightning_optim.config.strategy import OptimizerStrategy


def attach(module: LightningModule, strategy: OptimizerStrategy) -> None:
    """Let a module train with another optimizer than it configures, and with the callbacks that this brings along.

    Args:
        module: Any LightningModule with automatic optimization, on which no Trainer has run.
        strategy: The optimizer.
    """
    if isinstance(module, ConfiguredOptimizer):
        module.hparams["optimizer"] = strategy.as_config()
        return
    own: Any = module.configure_callbacks
    module.configure_optimizers = lambda: strategy.configure(module)  # type: ignore[method-assign]

    def configure_callbacks() -> list[Any]:
        freezing.freeze_before_wrapping(module, strategy.freeze)
        return [*_listed(own()), *strategy.callbacks()]

    module.configure_callbacks = configure_callbacks  # type: ignore[method-assign]


def _listed(callbacks: Any) -> list[Any]:
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
