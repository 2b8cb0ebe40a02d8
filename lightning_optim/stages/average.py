"""The running average of the iterates.  Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407.

The mean of n iterates moves by 1/n of the distance to the newest one; an exponential mean by 1 - decay of it, and
its first iterate is copied. Without the weight that this copy keeps, by (1 - decay) / (1 - decay^n) of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_optim.language import Options, Slot, Slots, Value, lerp
from lightning_optim.stages.stage import Stage

Kind = Literal["mean", "ema", "ema_debiased"]


class Average(Stage):
    """Collect an average of the parameter, without changing the parameter.

    Args:
        kind: "mean" gives all collected iterates the same weight, "ema" forgets old ones exponentially, "ema_debiased"
            also the first one.
        decay: Decay of an exponential mean for one collection.
        start: The real step (1 is the first) from which on iterates are collected.
        every: Steps between two collections; None where only calls of `collect` say when.
        window: For "mean": how many of the last collections it is of. A second slot has the mean of those since the
            last time that there were so many, and then takes the place of the first; so it is the mean of the last
            `window` to 2 * `window` - 1.
        ramp: For "ema": use the decay (1 + n) / (10 + n) after n collections while it is smaller.
    """

    name = "average"
    order = 1  # of what the step, and a sync of Lookahead in it, leave
    average = Slot(exact=True, copies=True)
    block = Slot(exact=True, copies=True)
    raw = Slot(exact=True)  # the weights of training while a model in 16 bits holds the average, else absent

    def __init__(
        self,
        kind: Kind = "mean",
        decay: float = 0.999,
        start: int = 0,
        every: int | None = 1,
        window: int | None = None,
        ramp: bool = False,
    ) -> None:
        self.kind, self.decay, self.start, self.every = kind, decay, start, every
        self.window, self.ramp = window, ramp
        self.steps = 0
        self.count = 0
        self.members = 0  # how many iterates the mean is of
        self.recent = 0  # and how many the one that will take its place
        self.latest = 0  # the step of the newest iterate

    def slots_beside(self, theirs: Sequence[str]) -> Sequence[str]:
        return ("average",) if self.window is None else ("average", "block")

    def advance(self) -> dict[str, Any] | None:
        self.steps += 1
        if self.every is None or self.steps < self.start or (self.steps - self.start) % self.every:
            return None
        return self.collect()

    def collect(self) -> dict[str, Any]:
        """Take in the weights as they are now; the options for `update`."""
        self.latest = self.steps
        self.count += 1
        if self.window is None:
            return {"weight": self._weight(self.count), "share": None, "renew": False}
        self.members += 1
        self.recent += 1
        found = {"weight": 1 / self.members, "share": 1 / self.recent, "renew": self.recent == self.window}
        if found["renew"]:
            self.members, self.recent = self.window, 0
        return found

    def _weight(self, n: int) -> float:
        """The share of the n-th collected iterate in the average."""
        if self.kind == "mean" or n == 1:
            return 1 / n
        if self.kind == "ema_debiased":
            return (1 - self.decay) / (1 - self.decay**n)
        return 1 - (min(self.decay, n / (9 + n)) if self.ramp else self.decay)

    @staticmethod
    def update(p: Value, s: Slots, h: Options) -> Value:
        if h.share is not None:
            s.block = lerp(s.block, p, h.share)
        s.average = s.block if h.renew else lerp(s.average, p, h.weight)
        return p

    def __repr__(self) -> str:
        what = {"mean": "mean", "ema": f"ema(decay={self.decay})", "ema_debiased": f"debiased ema({self.decay})"}
        last = f" of the last {self.window}" if self.window else ""
        when = "on call" if self.every is None else f"from step {self.start} every {self.every}"
        return f"Average {what[self.kind]}{last} {when}, {self.count} collected"
