"""What callbacks add to a step: arithmetic on a parameter, with slots of its own, in the pass of the update."""

from lightning_optim.stages.average import Average
from lightning_optim.stages.lookahead import Lookahead
from lightning_optim.stages.noise import Noise
from lightning_optim.stages.stage import Stage

__all__ = ["Average", "Lookahead", "Noise", "Stage"]
