"""Evaluate and save the running average of the weights.

Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407; Granziol et al. 2020, arXiv:2003.01247.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.raw_evaluation import RawEvaluation
from lightning_optim.core.standalone_stages import OnWeights
from lightning_optim.distributed.placement import reshard
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.stages.average import Average, Kind
from lightning_optim.training.schedules import fraction_done, total_steps


class IterateAveraging(RawEvaluation):
    """Average the weights over the steps. Validation, test and checkpoints use the average, training does not.

    The average is one more slot of each parameter: sharded, saved and resumed with the optimizer, and counted by
    `OptimizerStateMemory`. Until something is collected, the current weights are evaluated.

    Every checkpoint, also with `save_weights_only`, has the average in `state_dict`, and the weights of training in the
    optimizer's slot `average` (in `raw` for weights in 16 bits). A fit that resumes swaps them back. After `fit`
    the model has the average.

    Sources: Polyak & Juditsky 1992, SIAM J. Control Optim. 30(4); Izmailov et al. 2018, arXiv:1803.05407 ("mean");
    Granziol et al. 2020, arXiv:2003.01247.

    Args:
        kind: "mean" gives all collected weights the same weight. "ema" is an exponential moving average that starts
            as a copy of the first ones, "ema_debiased" one without the bias towards that copy.
        decay: Decay of an exponential average for one collection, in (0, 1): 0.999 averages over about 1000.
        start: The first optimizer step to collect, or a fraction of training below 1. Default: 0.75 for "mean", 0 for
            the others.
        every: Optimizer steps between two collections, or "epoch": at the end of each epoch. Default: "epoch" for
            "mean", 1 for the others.
        window: For "mean": average only the last `window` to 2 * `window` - 1 collections. Needs a second slot; use
            `start` instead if it is known when the last phase of training begins.
        ramp: For "ema": the decay grows with the number n of collections, as (1 + n) / (10 + n), up to `decay`.
        batch_norm: "recompute" runs `training_step` over training batches before the average is used, since the running
            statistics belong to other weights; "keep" does not. Layers in eval mode keep theirs. Models without batch
            normalization are not affected.
        batch_norm_batches: Number of training batches for that. Default: as many as the longest epoch so far has had.
        evaluate_raw: Run each validation, and a test after the fit, with the weights of training too, and log their
            metrics beside those of the average, as `val/accuracy_raw` beside `val/accuracy`. A validation takes twice
            as long then.

    Raises:
        OptionError: if an option is out of range; at the start of the fit, if `start` is a fraction and the length of
            training is unknown, if another callback also chooses the weights to evaluate, or if the training loader
            cannot give batches for `batch_norm`; when a checkpoint is loaded, if its average has another `kind` or
            `window`.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> averaging = IterateAveraging("ema", decay=0.9)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(fast_dev_run=3, callbacks=[averaging], **options)
        >>> model = BoringModel()
        >>> trainer.fit(model)
        >>> averaging.swapped  # the model has the average
        True
        >>> last = trainer.optimizers[0].state[model.layer.weight]["average"]  # the slot has the last weights
        >>> torch.equal(model.layer.weight, last)
        False

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.IterateAveraging
                  init_args: {kind: ema, decay: 0.999}
    """

    slot = "average"
    _stages: list[Average]

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
        evaluate_raw: bool = False,
    ) -> None:
        super().__init__(batch_norm, batch_norm_batches)
        check = functools.partial(errors.check, "IterateAveraging")
        errors.check_choice("IterateAveraging", "kind", kind, get_args(Kind))
        check("decay", decay, is_number(decay) and 0 < decay < 1, "in (0, 1)")
        step = is_number(start) and 0 <= start < math.inf and (start < 1 or float(start).is_integer())
        check("start", start, start is None or step, "a step, or a fraction of training below 1")
        paced = every is None or is_whole(every) or (isinstance(every, str) and every == "epoch")
        check("every", every, paced, "an integer of at least 1, or 'epoch'")
        windowed = kind == "mean" and is_whole(window)
        check("window", window, window is None or windowed, "an integer of at least 1, with kind='mean'")
        check("ramp", ramp, ramp is False or (ramp is True and kind == "ema"), "False, except with kind='ema'")
        check("evaluate_raw", evaluate_raw, isinstance(evaluate_raw, bool), "True or False")
        self.kind: Kind = kind
        self.evaluate_raw = evaluate_raw
        self.decay, self.window, self.ramp = float(decay), None if window is None else int(window), ramp
        first = (0.75 if kind == "mean" else 0) if start is None else start
        self.start: int | float = float(first) if 0 < first < 1 else int(first)
        paced_by = ("epoch" if kind == "mean" else 1) if every is None else every
        self.every: int | str = "epoch" if paced_by == "epoch" else int(paced_by)

    @override
    def forget(self) -> None:
        super().forget()
        self._collectors: list[OnWeights] = []  # run a stage outside of a step

    # ------------------------------------------------------------------ hooks

    @override
    def stages_for(self, optimizers: Sequence[torch.optim.Optimizer]) -> Sequence[Average]:
        return [Average(self.kind, self.decay, window=self.window, ramp=self.ramp) for _ in optimizers]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.attach(trainer, self.stages_for(trainer.optimizers))
        self._collectors = [OnWeights(s, o) for s, o in zip(self._stages, trainer.optimizers, strict=True)]
        self.begin(trainer, pl_module)
        self.restore_counters()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        by_epoch = self.every == "epoch"
        for stage in self._stages:
            stage.every = None if by_epoch else int(self.every)
            stage.start = 0 if by_epoch else self._first_step(trainer)
        if by_epoch and 0 < self.start < 1 and fraction_done(trainer) is None:
            raise self._unknown_length()
        self._warn_if_nothing_is_collected(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect at the end of an epoch, if `every` is "epoch"."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.every != "epoch" or not (trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches):
            return
        reshard(trainer.strategy.model)  # after a batch without a loss FSDP has not resharded the parameters
        for stage, collector in zip(self._stages, self._collectors, strict=True):
            if stage.steps > stage.latest and self._has_started(trainer, stage):
                collector.run(stage.collect())

    def _has_started(self, trainer: Trainer, stage: Average) -> bool:
        if 0 < self.start < 1:
            fraction = fraction_done(trainer)
            return fraction is not None and fraction >= self.start
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
            raise self._unknown_length()
        return math.ceil(self.start * total)

    def _unknown_length(self) -> OptionError:
        return OptionError(
            f"IterateAveraging: start={self.start} is a fraction of training, whose length is unknown here. Give a "
            "step number, or set max_epochs or max_steps of the Trainer."
        )

    def _warn_if_nothing_is_collected(self, trainer: Trainer) -> None:
        """Warn if `max_steps` ends training in the middle of the first epoch to collect."""
        batches, max_steps = trainer.num_training_batches, trainer.max_steps
        if self.every != "epoch" or max_steps == -1 or not trainer.lightning_module.automatic_optimization:
            return
        steps = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else max_steps + 1
        last = max_steps // steps * steps
        if not last or last < (self.start * max_steps if self.start < 1 else self.start):
            rank_zero_warn(
                f"IterateAveraging: every='epoch' collects nothing, for max_steps={max_steps} ends training before an "
                f"epoch ends from start={self.start} on. Give every a number of steps."
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
        if trainer.loggers and (count := self.version(trainer)):
            values = {"iterate_averaging/collected": float(count), "iterate_averaging/distance": self.distance(trainer)}
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    @override
    def release(self) -> None:
        super().release()
        self._collectors = []

    # ------------------------------------------------------------------ swapping

    @override
    def version(self, trainer: Trainer) -> int:
        return sum(stage.count for stage in self._stages)

    @override
    def ready(self, i: int) -> bool:
        return self._stages[i].count > 0

    # ------------------------------------------------------------------ checkpoints

    @override
    def counters(self) -> dict[str, Any]:
        return {
            **super().counters(),
            "kind": self.kind,
            "window": self.window,
            "counts": [stage.count for stage in self._stages],
            "latest": [stage.latest for stage in self._stages],
            "members": [(stage.members, stage.recent) for stage in self._stages],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["kind"] != self.kind:
            raise OptionError(
                f"IterateAveraging: the checkpoint holds an average of kind {state_dict['kind']!r} and this run has "
                f"{self.kind!r}. Set kind to the checkpoint's, or load only the weights."
            )
        if state_dict.get("window") != self.window:
            raise OptionError(
                f"IterateAveraging: the checkpoint holds an average with window={state_dict.get('window')} and this "
                f"run has window={self.window}. Set window to the checkpoint's, or load only the weights."
            )
        super().load_state_dict(state_dict)

    @override
    def set_counters(self, state: Mapping[str, Any]) -> None:
        super().set_counters(state)
        for stage, count in zip(self._stages, state["counts"], strict=True):
            stage.count = count
        for stage, latest in zip(self._stages, state.get("latest", state["steps"]), strict=True):
            stage.latest = latest
        for stage, members in zip(self._stages, state.get("members", []), strict=False):
            stage.members, stage.recent = members
