"""Lookahead.  Zhang, Lucas, Hinton & Ba 2019, arXiv:1907.08610, Algorithm 1.

Every k steps the slow weights move by the fraction alpha of the distance to the fast weights, and the fast weights
continue from there. The first moments of the optimizer may be reset then, or pulled back like the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_optim.language import Options, Slot, Slots, Value, lerp
from lightning_optim.stages.stage import Stage

Momentum = Literal["none", "reset", "pullback"]


class Lookahead(Stage):
    """Pull the parameter to slow weights every `k` steps.

    Args:
        k: The number of steps between two syncs.
        alpha: The fraction of the distance by which the slow weights move to the fast ones, in (0, 1].
        momentum: What a sync does to first moments: "none" leaves them, "reset" sets them to zero, "pullback" adds slow
            first moments, initially zero, and treats both like the weights.
        moments: The slots of the optimizer that are first moments.
    """

    name = "lookahead"
    slow = Slot(exact=True, copies=True)
    raw = Slot(exact=True)  # the fast weights while a model in 16 bits holds the slow ones, else absent

    def __init__(
        self, k: int = 5, alpha: float = 0.5, momentum: Momentum = "none", moments: Sequence[str] = ()
    ) -> None:
        self.k, self.alpha, self.momentum, self.moments = k, alpha, momentum, tuple(moments)
        if momentum == "pullback":
            self.slots = {**self.slots, **{f"slow_{name}": Slot(exact=True) for name in moments}}
        self.steps = 0
        self.syncs = 0

    def slots_beside(self, theirs: Sequence[str]) -> Sequence[str]:
        return ("slow", *(f"slow_{name}" for name in theirs if f"slow_{name}" in self.slots))

    def advance(self) -> dict[str, Any] | None:
        self.steps += 1
        if self.steps % self.k:
            return None
        self.syncs += 1
        return {"alpha": self.alpha, "momentum": self.momentum, "moments": self.moments}

    @staticmethod
    def update(p: Value, s: Slots, h: Options) -> Value:
        s.slow = lerp(s.slow, p, h.alpha)
        for name in map(str, h.moments) if h.momentum != "none" else ():
            if name not in s:
                continue
            moment = getattr(s, name)
            if h.momentum == "reset":
                setattr(s, name, moment * 0.0)
            else:
                back = lerp(getattr(s, f"slow_{name}"), moment, h.alpha)
                setattr(s, f"slow_{name}", back)
                setattr(s, name, back)
        slow: Value = s.slow
        return slow

    def __repr__(self) -> str:
        momentum = "" if self.momentum == "none" else f", momentum {self.momentum}"
        return f"Lookahead(k={self.k}, alpha={self.alpha}{momentum}), {self.syncs} syncs"
