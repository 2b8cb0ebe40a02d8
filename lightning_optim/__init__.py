"""Optimizers and training callbacks for PyTorch Lightning, each written once and run anywhere."""

from lightning_optim import optimizers
from lightning_optim.configured import ConfiguredOptimizer
from lightning_optim.conversions import from_paper, normalized_weight_decay
from lightning_optim.errors import OptionError
from lightning_optim.optimizer import Optimizer
from lightning_optim.optimizers import *  # noqa: F403
from lightning_optim.strategy import OptimizerSpec, OptimizerStrategy, create_optimizer, list_optimizers

__version__ = "0.1.0"

__all__ = [
    "ConfiguredOptimizer",
    "Optimizer",
    "OptimizerSpec",
    "OptimizerStrategy",
    "OptionError",
    "create_optimizer",
    "from_paper",
    "list_optimizers",
    "normalized_weight_decay",
]
__all__ += optimizers.__all__
