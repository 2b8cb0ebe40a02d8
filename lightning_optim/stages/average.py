"""The running average of the iterates.  Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407.

The mean of n iterates moves by 1/n of the distance to the newest one; an exponential mean by 1 - decay of it, and
its first iterate is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_optim.math import lerp
from lightning_optim.slot import Slot
from lightning_optim.stages.stage import Stage


class Average(Stage):
    """Collect an average of the parameter, without changing the parameter.

    Args:
        kind: "mean" gives all collected iterates the same weight, "ema" forgets old ones exponentially.
        decay: Decay of the exponential mean for one collection.
        start: The real step (1 is the first) from which on iterates are collected.
        every: Steps between two collections.
    """

    name = "average"
    order = 1  # of what the step, and a sync of Lookahead in it, leave
    average = Slot(exact=True, copies=True)
    raw = Slot(exact=True)  # the weights of training while a model in 16 bits holds the average, else absent

    def __init__(
        self, kind: Literal["mean", "ema"] = "mean", decay: float = 0.999, start: int = 0, every: int = 1
    ) -> None:
        self.kind, self.decay, self.start, self.every = kind, decay, start, every
        self.steps = 0
        self.count = 0

    def slots_beside(self, theirs: Sequence[str]) -> Sequence[str]:
        return ("average",)

    def advance(self) -> dict[str, Any] | None:
        self.steps += 1
        if self.steps < self.start or (self.steps - self.start) % self.every:
            return None
        self.count += 1
        return {"weight": 1 / self.count if self.kind == "mean" or self.count == 1 else 1 - self.decay}

    @staticmethod
    def update(p: Any, s: Any, h: Any) -> Any:
        s.average = lerp(s.average, p, h.weight)
        return p

    def __repr__(self) -> str:
        what = "mean" if self.kind == "mean" else f"ema(decay={self.decay})"
        return f"Average {what} from step {self.start} every {self.every}, {self.count} collected"
