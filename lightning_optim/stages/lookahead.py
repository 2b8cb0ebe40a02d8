"""Lookahead.  Zhang, Lucas, Hinton & Ba 2019, arXiv:1907.08610, Algorithm 1.

Every k steps the slow weights move by alpha of the way to the fast ones, and the fast ones restart there.
"""

from __future__ import annotations

from typing import Any

from lightning_optim.math import lerp
from lightning_optim.slot import Slot
from lightning_optim.stages.stage import Stage


class Lookahead(Stage):
    """Pull the parameter to slow weights every `k` steps.

    Args:
        k: Steps of the fast weights between two syncs.
        alpha: How far the slow weights move to the fast ones, in (0, 1].
    """

    name = "lookahead"
    slow = Slot(exact=True, copies=True)

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        self.k, self.alpha = k, alpha
        self.steps = 0

    def advance(self) -> dict[str, Any] | None:
        self.steps += 1
        return None if self.steps % self.k else {"alpha": self.alpha}

    @staticmethod
    def update(p: Any, s: Any, h: Any) -> Any:
        s.slow = lerp(s.slow, p, h.alpha)
        return s.slow

    def __repr__(self) -> str:
        return f"Lookahead(k={self.k}, alpha={self.alpha}), {self.steps // self.k} syncs"
