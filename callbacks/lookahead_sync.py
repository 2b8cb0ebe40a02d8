"""Lookahead around any optimizer.  Zhang, Lucas, Hinton & Ba 2019, arXiv:1907.08610."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_optim.errors import OptionError
from lightning_optim.stages.attach import attach
from lightning_optim.stages.lookahead import Lookahead


class LookaheadSync(Callback):
    """Every `k` real steps, move slow weights by `alpha` towards the fast ones and restart the fast ones there.

    The slow weights are optimizer state: sharded, saved and resumed with it, and counted by the memory report.
    Validation sees the fast weights.

    Args:
        k: Steps of the optimizer between two syncs, at least 1.
        alpha: How far the slow weights move, in (0, 1].

    Raises:
        OptionError: where `k` or `alpha` is out of range.
    """

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1 or int(k) != k:
            raise OptionError(f"LookaheadSync: k={k!r} must be an integer of at least 1.")
        if not 0 < alpha <= 1:
            raise OptionError(f"LookaheadSync: alpha={alpha!r} must be in (0, 1].")
        self.k, self.alpha = int(k), float(alpha)
        self._stages: list[Lookahead] = []
        self._detach: list[Callable[[], None]] = []
        self._loaded: list[int] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stages = [Lookahead(self.k, self.alpha) for _ in trainer.optimizers]
        self._detach = [attach(s, o) for s, o in zip(self._stages, trainer.optimizers, strict=True)]
        self._take_loaded()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._detach:
            self._detach.pop()()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": [stage.steps for stage in self._stages]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = list(state_dict["steps"])
        self._take_loaded()

    def _take_loaded(self) -> None:
        """Counters arrive before the optimizers exist in one process and under DDP, and after that when sharded."""
        if self._stages and self._loaded:
            for stage, steps in zip(self._stages, self._loaded, strict=True):
                stage.steps = steps
            self._loaded = []
