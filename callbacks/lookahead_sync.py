"""Lookahead around any optimizer.  Zhang, Lucas, Hinton & Ba 2019, arXiv:1907.08610."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.swapped_weights import SwappedWeights
from lightning_optim.core.foreign_stages import attach
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.core.standalone_stages import FIRST_MOMENTS
from lightning_optim.errors import OptionError, is_number
from lightning_optim.stages.lookahead import Lookahead, Momentum


class LookaheadSync(SwappedWeights):
    """Every `k` real steps, move slow weights by `alpha` towards the fast ones and restart the fast ones there.

    The slow weights are optimizer state: sharded, saved and resumed with it, and counted by the memory report. Where
    `k` does not divide the number of steps the last steps are fast ones.

    Args:
        k: Steps of the optimizer between two syncs, at least 1.
        alpha: How far the slow weights move, in (0, 1].
        momentum: What a sync does to the optimizer's first moments: "none" leaves them, "reset" forgets them,
            "pullback" keeps slow ones beside them, from zero on, and treats both like the weights. Second moments and
            counters stay.
        evaluate: "fast" validates and saves the weights that the optimizer moves; "slow" the slow ones, from the first
            sync on, which then are also in the model after the fit.

    Raises:
        OptionError: where `k` or `alpha` is out of range, and where the optimizer has no first moments to treat.
    """

    slot = "slow"

    def __init__(
        self,
        k: int = 5,
        alpha: float = 0.5,
        momentum: Momentum = "none",
        evaluate: Literal["fast", "slow"] = "fast",
    ) -> None:
        check = functools.partial(errors.check, "LookaheadSync")
        whole = is_number(k) and 1 <= k < math.inf and k == int(k)
        check("k", k, whole, "an integer of at least 1")
        check("alpha", alpha, is_number(alpha) and 0 < alpha <= 1, "in (0, 1]")
        check("momentum", momentum, momentum in ("none", "reset", "pullback"), "'none', 'reset' or 'pullback'")
        check("evaluate", evaluate, evaluate in ("fast", "slow"), "'fast' or 'slow'")
        self.k, self.alpha, self.momentum, self.evaluate = int(k), float(alpha), momentum, evaluate
        self.swaps = evaluate == "slow"
        self._stages: list[Lookahead] = []
        self._detach = []
        self._loaded: dict[str, Any] | None = None
        self._logged = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stages = []
        for optimizer in trainer.optimizers:
            stage = Lookahead(self.k, self.alpha, self.momentum, self._moments(optimizer))
            self._stages.append(stage)
            self._detach.append(attach(stage, optimizer))
        self.begin(trainer, pl_module)
        self._logged = trainer.global_step
        self._take_loaded()

    def _moments(self, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        """The slots that a sync treats beside the weights."""
        if self.momentum == "none":
            return ()
        if isinstance(optimizer, Optimizer):
            kept = {name for i, p in optimizer.every_parameter() for name in optimizer.slots_of(i, p)}
            found = tuple(name for name in sorted(kept) if optimizer.slots[name].is_first_moment)
        else:
            has = any(group.get("momentum") or group.get("betas") for group in optimizer.param_groups)
            found = FIRST_MOMENTS if has else ()
        if not found:
            raise OptionError(
                f"LookaheadSync: momentum={self.momentum!r} finds no first moments in {type(optimizer).__name__}, as "
                "it is set here. Set momentum='none'."
            )
        return found

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log how far the fast weights went, one step before a sync, when it is time to log."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = trainer.loggers and trainer.global_step - self._logged >= every
        if due and any((stage.steps + 1) % self.k == 0 for stage in self._stages):
            self._logged = trainer.global_step
            values = {"lookahead/distance": self.distance(trainer)}
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    @override
    def ready(self, i: int) -> bool:
        return self._stages[i].steps >= self.k

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": [stage.steps for stage in self._stages], "swapped": self.swapped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self._take_loaded()

    def _take_loaded(self) -> None:
        """Counters arrive before the optimizers exist in one process and under DDP, and after that when sharded."""
        if self._stages and self._loaded is not None:
            for stage, steps in zip(self._stages, self._loaded["steps"], strict=True):
                stage.steps = steps
            self.swapped = self._loaded.get("swapped", False)
            self._loaded = None
