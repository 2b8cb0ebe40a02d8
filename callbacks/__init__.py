"""Callbacks for the Trainer: they decide when; stages and pure functions compute."""

from lightning_optim.callbacks.iterate_averaging import IterateAveraging
from lightning_optim.callbacks.lookahead_sync import LookaheadSync
from lightning_optim.callbacks.loss_input import LossInput
from lightning_optim.callbacks.optimizer_state_memory import OptimizerStateMemory

__all__ = ["IterateAveraging", "LookaheadSync", "LossInput", "OptimizerStateMemory"]
