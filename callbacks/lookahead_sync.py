"""Lookahead around any optimizer.  Zhang, Lucas, Hinton & Ba 2019, arXiv:1907.08610."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.swapped_weights import SwappedWeights
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.core.standalone_stages import FIRST_MOMENTS
from lightning_optim.errors import OptionError, is_number
from lightning_optim.stages.lookahead import Lookahead, Momentum


class LookaheadSync(SwappedWeights):
    """Every `k` steps, move slow weights towards the weights of the optimizer, and continue from the slow weights.

    The slow weights are optimizer state: sharded, saved and resumed with it, and counted by `OptimizerStateMemory`.
    If `k` does not divide the number of steps, training ends between two syncs, on fast weights.

    Source: Zhang, Lucas, Hinton & Ba 2019, arXiv:1907.08610, Algorithm 1.

    Args:
        k: Steps of the optimizer between two syncs, at least 1.
        alpha: The slow weights move by this fraction of the way, in (0, 1].
        momentum: What a sync does to the optimizer's first moments: "none" keeps them, "reset" sets them to zero,
            "pullback" adds slow first moments, initially zero, and treats both like the weights. Second moments and
            step counters are never changed.
        evaluate: The weights for validation, checkpoints and the model after the fit: "fast" are the optimizer's,
            "slow" the slow ones, once there was a sync.

    Raises:
        OptionError: if an option is out of range; at the start of the fit, if `momentum` is not "none" and the
            optimizer has no first moments, or if another callback also chooses the weights to evaluate.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(fast_dev_run=2, callbacks=[LookaheadSync(k=2)], **options)
        >>> model = BoringModel()
        >>> trainer.fit(model)
        >>> slow = trainer.optimizers[0].state[model.layer.weight]["slow"]
        >>> torch.equal(model.layer.weight, slow)  # after a sync
        True

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.LookaheadSync
                  init_args: {k: 5, alpha: 0.5}
    """

    slot = "slow"
    _stages: list[Lookahead]

    def __init__(
        self,
        k: int = 5,
        alpha: float = 0.5,
        momentum: Momentum = "none",
        evaluate: Literal["fast", "slow"] = "fast",
    ) -> None:
        super().__init__()
        check = functools.partial(errors.check, "LookaheadSync")
        whole = is_number(k) and 1 <= k < math.inf and k == int(k)
        check("k", k, whole, "an integer of at least 1")
        check("alpha", alpha, is_number(alpha) and 0 < alpha <= 1, "in (0, 1]")
        errors.check_choice("LookaheadSync", "momentum", momentum, get_args(Momentum))
        errors.check_choice("LookaheadSync", "evaluate", evaluate, ["fast", "slow"])
        self.k, self.alpha, self.evaluate = int(k), float(alpha), evaluate
        self.momentum: Momentum = momentum
        self.swaps = evaluate == "slow"
        self._last_log = 0  # global step

    @override
    def stages_for(self, optimizers: Sequence[torch.optim.Optimizer]) -> Sequence[Lookahead]:
        moments = [self._moments(optimizer) for optimizer in optimizers]
        return [Lookahead(self.k, self.alpha, self.momentum, names) for names in moments]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.attach(trainer, self.stages_for(trainer.optimizers))
        self.begin(trainer, pl_module)
        self._last_log = trainer.global_step
        self.restore_counters()

    def _moments(self, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        """The first moments that a sync changes."""
        if self.momentum == "none":
            return ()
        if isinstance(optimizer, Optimizer):
            kept = {name for i, p in optimizer.every_parameter() for name in optimizer.slots_of(i, p)}
            moments = tuple(name for name in sorted(kept) if optimizer.slots[name].is_first_moment)
        else:
            has = any(group.get("momentum") or group.get("betas") for group in optimizer.param_groups)
            moments = FIRST_MOMENTS if has else ()
        if not moments:
            raise OptionError(
                f"LookaheadSync: momentum={self.momentum!r} finds no first moments in {type(optimizer).__name__} with "
                "these options. Set momentum='none'."
            )
        return moments

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the distance between fast and slow weights, in the step before a sync and every `log_every_n_steps`."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = trainer.loggers and every and trainer.global_step - self._last_log >= every
        if due and any((stage.steps + 1) % self.k == 0 for stage in self._stages):
            self._last_log = trainer.global_step
            values = {"lookahead_sync/distance": self.distance(trainer)}
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    @override
    def ready(self, i: int) -> bool:
        return self._stages[i].syncs > 0

    @override
    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "syncs": [stage.syncs for stage in self._stages]}

    @override
    def set_counters(self, state: Mapping[str, Any]) -> None:
        super().set_counters(state)
        for stage, syncs in zip(self._stages, state.get("syncs", [n // self.k for n in state["steps"]]), strict=True):
            stage.syncs = syncs
