"""Stages: arithmetic that callbacks add to an update, with slots of its own, in the same pass over memory."""

from lightning_optim.stages.average import Average
from lightning_optim.stages.lookahead import Lookahead
from lightning_optim.stages.noise import Noise
from lightning_optim.stages.stage import Stage

__all__ = ["Average", "Lookahead", "Noise", "Stage"]
