"""The running average of the iterates.  Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407.

In one collection an average moves towards the newest iterate by a fraction of the distance: the mean of n iterates by
1 / n, an exponential average that starts as a copy of the first iterate by 1 - decay, and one without the bias towards
that copy by (1 - decay) / (1 - decay^n).
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
        decay: The decay of an exponential average, per collection.
        start: The first step to collect; 1 is the first step.
        every: The number of steps between two collections; None to collect only on calls of `collect`.
        window: For "mean": average only the last `window` to 2 * `window` - 1 collections. A second slot has the mean
            of up to `window` of the last collections. Once it has `window`, the first slot becomes a copy of it.
        ramp: For "ema": use the decay (1 + n) / (10 + n) after n collections while that is smaller.
    """

    name = "average"
    order = 1  # after a sync of Lookahead in the same step
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
        self.members = 0  # the number of iterates in `average`
        self.recent = 0  # the number of iterates in `block`
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
        """The weight of collected iterate number n in the average."""
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
