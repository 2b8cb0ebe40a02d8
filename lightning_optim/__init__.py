"""Optimizers and training callbacks for PyTorch Lightning, each written once and run anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_optim import optimizers
from lightning_optim.config import command_line
from lightning_optim.config.create import create_optimizer
from lightning_optim.config.mixin import ConfiguredOptimizer
from lightning_optim.config.recipes import list_optimizers, register_optimizer
from lightning_optim.config.strategy import OptimizerSpec, OptimizerStrategy
from lightning_optim.config.weight_decay import from_paper, normalized_weight_decay
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.core.weight_average import WeightAverage
from lightning_optim.errors import OptionError
from lightning_optim.optimizers import *  # noqa: F403

if TYPE_CHECKING:
    from lightning_optim.commands.compare import compare
    from lightning_optim.estimate.estimate import estimate_memory

__version__ = "0.1.0"
LATER = {  # what they need is slow to import
    "compare": "lightning_optim.commands.compare",
    "estimate_memory": "lightning_optim.estimate.estimate",
}

command_line.register()

__all__ = [
    "ConfiguredOptimizer",
    "Optimizer",
    "OptimizerSpec",
    "OptimizerStrategy",
    "OptionError",
    "WeightAverage",
    "compare",
    "create_optimizer",
    "estimate_memory",
    "from_paper",
    "list_optimizers",
    "normalized_weight_decay",
    "register_optimizer",
]
__all__ += optimizers.__all__


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)
