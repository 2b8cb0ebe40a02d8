"""Evaluate and save the running average of the iterates.

Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407; Granziol et al. 2020, arXiv:2003.01247.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.swapped_weights import SwappedWeights
from lightning_optim.core.foreign_stages import attach
from lightning_optim.core.standalone_stages import OnWeights
from lightning_optim.distributed.placement import reshard
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.stages.average import Average, Kind
from lightning_optim.training.batch_norm import batch_norm_buffers, recompute
from lightning_optim.training.schedules import total_steps


class IterateAveraging(SwappedWeights):
    """Keep an average of the weights as optimizer state; validation, test and checkpoints use it, training does not.

    The average is one more slot of each parameter, so it is sharded, saved and resumed with the optimizer and
    counted by the memory report. While nothing is collected yet, the current weights are evaluated.

    Every checkpoint, also with `save_weights_only`, holds the average in `state_dict`; the weights that training goes
    on from stand in the optimizer's slot `average` meanwhile (`raw` for weights in 16 bits), and are put back when a
    fit resumes from it. After `fit` the model holds the average.

    Args:
        kind: "mean" weighs all collected iterates the same, "ema" forgets old ones exponentially, from a copy of the
            first one on, and "ema_debiased" forgets that one like the others.
        decay: Decay of an exponential mean for one collection, in (0, 1): 0.999 remembers about 1000 collections.
        start: The optimizer step from which on iterates are collected; a number below 1 is a fraction of training.
            By default 0.75 for "mean" and 0 for the others.
        every: Optimizer steps between two collections, or "epoch": at the end of each, whatever the number of its
            steps. By default "epoch" for "mean" and 1 for the others.
        window: For "mean": average the last `window` to 2 * `window` - 1 collections only, at the price of a second
            slot. For a tail of which the beginning is known, `start` is enough.
        ramp: For "ema": let the decay grow with the number n of collections, as (1 + n) / (10 + n), up to `decay`.
        batch_norm: "recompute" passes once over training batches before the average is used, since statistics of
            the raw weights do not belong to it; "keep" leaves the running statistics as they are. Models without
            batch normalisation are not affected.
        batch_norm_batches: How many training batches to use for that; all of an epoch by default.

    Raises:
        OptionError: where an option is out of range, or a fraction is given and the length of training is unknown.
    """

    slot = "average"

    def __init__(
        self,
        kind: Kind = "mean",
        decay: float = 0.999,
        start: int | float | None = None,
        every: int | Literal["epoch"] | None = None,
        batch_norm: Literal["recompute", "keep"] = "recompute",
        batch_norm_batches: int | None = None,
        window: int | None = None,
        ramp: bool = False,
    ) -> None:
        check = functools.partial(errors.check, "IterateAveraging")
        check("kind", kind, kind in ("mean", "ema", "ema_debiased"), "'mean', 'ema' or 'ema_debiased'")
        check("decay", decay, is_number(decay) and 0 < decay < 1, "in (0, 1)")
        step = is_number(start) and 0 <= start < math.inf and (start < 1 or float(start).is_integer())
        check("start", start, start is None or step, "a step, or a fraction of training below 1")
        paced = every is None or every == "epoch" or is_whole(every)
        check("every", every, paced, "an integer of at least 1, or 'epoch'")
        check("batch_norm", batch_norm, batch_norm in ("recompute", "keep"), "'recompute' or 'keep'")
        limit = batch_norm_batches
        check("batch_norm_batches", limit, limit is None or is_whole(limit), "an integer of at least 1")
        last = kind == "mean" and is_whole(window)
        check("window", window, window is None or last, "an integer of at least 1, with kind='mean'")
        check("ramp", ramp, ramp is False or (ramp is True and kind == "ema"), "False, but with kind='ema'")
        self.kind, self.decay, self.window, self.ramp = kind, decay, window, ramp
        self.start: int | float = (0.75 if kind == "mean" else 0) if start is None else start
        self.every: int | str = ("epoch" if kind == "mean" else 1) if every is None else every
        self.batch_norm, self.batch_norm_batches = batch_norm, batch_norm_batches
        self._stages: list[Average] = []
        self._alone: list[OnWeights] = []
        self._detach = []
        self._raw_buffers: dict[str, Tensor] = {}  # statistics of the raw weights, while swapped
        self._fresh_buffers: tuple[int, dict[str, Tensor]] | None = None  # of the average, with its count
        self._loaded: dict[str, Any] | None = None

    # ------------------------------------------------------------------ when

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stages = [Average(self.kind, self.decay, window=self.window, ramp=self.ramp) for _ in trainer.optimizers]
        self._detach = [attach(s, o) for s, o in zip(self._stages, trainer.optimizers, strict=True)]
        self._alone = [OnWeights(s, o) for s, o in zip(self._stages, trainer.optimizers, strict=True)]
        self.begin(trainer, pl_module)
        self._take_loaded()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        by_epoch = self.every == "epoch"
        for stage in self._stages:
            stage.every = None if by_epoch else int(self.every)
            stage.start = 0 if by_epoch else self._first_step(trainer)
        if by_epoch and 0 < self.start < 1 and _share(trainer) is None:
            raise self._endless()
        self._warn_of_nothing(trainer)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an epoch take in the weights, whatever the number of steps that it really had."""
        if self.every != "epoch" or not (trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches):
            return
        reshard(trainer.strategy.model)  # after a batch without a loss FSDP still shows whole parameters
        for stage, alone in zip(self._stages, self._alone, strict=True):
            if stage.steps > stage.latest and self._has_begun(trainer, stage):
                alone.run(stage.collect())

    def _has_begun(self, trainer: Trainer, stage: Average) -> bool:
        if 0 < self.start < 1:
            share = _share(trainer)
            return share is not None and share >= self.start
        return stage.steps >= self.start

    def _first_step(self, trainer: Trainer) -> int:
        if not 0 < self.start < 1:
            return int(self.start)
        if not trainer.lightning_module.automatic_optimization:
            raise OptionError(
                f"IterateAveraging: start={self.start} is a fraction of training, and in manual optimization the "
                "Trainer does not know how many steps each optimizer will take. Give a step number, or every='epoch'."
            )
        total = math.inf if trainer.max_epochs == -1 and trainer.max_steps == -1 else total_steps(trainer)
        if not math.isfinite(total):
            raise self._endless()
        return math.ceil(self.start * total)

    def _endless(self) -> OptionError:
        return OptionError(
            f"IterateAveraging: start={self.start} is a fraction of training, whose length is unknown here. Give a "
            "step number, or set max_epochs or max_steps of the Trainer."
        )

    def _warn_of_nothing(self, trainer: Trainer) -> None:
        """Say beforehand that no epoch ends late enough, where `max_steps` ends the training in the middle of one."""
        batches, most = trainer.num_training_batches, trainer.max_steps
        if self.every != "epoch" or most == -1 or not trainer.lightning_module.automatic_optimization:
            return
        steps = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else most + 1
        last = most // steps * steps
        if not last or last < (self.start * most if self.start < 1 else self.start):
            rank_zero_warn(
                f"IterateAveraging: every='epoch' collects nothing, for max_steps={most} ends training before an epoch "
                f"ends from start={self.start} on. Give every a number of steps."
            )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        if trainer.loggers and (count := self._count()):
            values = {"iterate_averaging/collected": float(count), "iterate_averaging/distance": self.distance(trainer)}
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._raw_buffers.clear()

    # ------------------------------------------------------------------ what

    def _count(self) -> int:
        return sum(stage.count for stage in self._stages)

    @override
    def ready(self, i: int) -> bool:
        return self._stages[i].count > 0

    @override
    @torch.no_grad()
    def after_swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give batch normalisations the statistics of the weights that are in the model."""
        if not self.swapped:
            _copy_buffers(pl_module, self._raw_buffers)
            self._raw_buffers = {}
        elif self.batch_norm == "recompute" and batch_norm_buffers(pl_module):
            self._raw_buffers = {n: b.clone() for n, b in batch_norm_buffers(pl_module).items()}
            count = self._count()
            if self._fresh_buffers is None or self._fresh_buffers[0] != count:
                recompute(trainer, pl_module, self.batch_norm_batches)
                fresh = {n: b.clone() for n, b in batch_norm_buffers(pl_module).items()}
                self._fresh_buffers = (count, fresh)
            _copy_buffers(pl_module, self._fresh_buffers[1])

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "window": self.window,
            "steps": [stage.steps for stage in self._stages],
            "counts": [stage.count for stage in self._stages],
            "latest": [stage.latest for stage in self._stages],
            "members": [(stage.members, stage.recent) for stage in self._stages],
            "swapped": self.swapped,
            "raw_buffers": dict(self._raw_buffers),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["kind"] != self.kind:
            raise OptionError(
                f"IterateAveraging: the checkpoint holds an average of kind {state_dict['kind']!r} and this run wants "
                f"{self.kind!r}. Set kind to the checkpoint's, or load only the weights."
            )
        if state_dict.get("window") != self.window:
            raise OptionError(
                f"IterateAveraging: the checkpoint holds an average with window={state_dict.get('window')} and this "
                f"run wants window={self.window}. Set window to the checkpoint's, or load only the weights."
            )
        self._loaded = state_dict
        self._take_loaded()

    def _take_loaded(self) -> None:
        """Counters arrive before the optimizers exist in one process and under DDP, and after that when sharded."""
        if self._loaded is None or not self._stages:
            return
        for stage, steps, count in zip(self._stages, self._loaded["steps"], self._loaded["counts"], strict=True):
            stage.steps, stage.count = steps, count
        for stage, latest in zip(self._stages, self._loaded.get("latest", self._loaded["steps"]), strict=True):
            stage.latest = latest
        for stage, members in zip(self._stages, self._loaded.get("members", []), strict=False):
            stage.members, stage.recent = members
        self.swapped = self._loaded["swapped"]
        self._raw_buffers = dict(self._loaded["raw_buffers"])
        self._loaded = None


def _share(trainer: Trainer) -> float | None:
    """Which part of the training is over when this epoch is; None where that is unknown."""
    parts = []
    if trainer.max_epochs not in (None, -1):
        parts.append((trainer.current_epoch + 1) / trainer.max_epochs)
    if trainer.max_steps != -1:
        parts.append(trainer.global_step / trainer.max_steps)
    return max(parts, default=None)


def _copy_buffers(module: nn.Module, values: dict[str, Tensor]) -> None:
    buffers = batch_norm_buffers(module)
    for name, value in values.items():
        buffers[name].copy_(value)
