"""The base of callbacks that can evaluate the weights of training beside those that they swap in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_optim.callbacks.swapped_statistics import SwappedStatistics
from lightning_optim.core.swap import swap
from lightning_optim.training.batch_norm import batch_norm_buffers, copy_buffers
from lightning_optim.training.second_evaluation import metrics_of, numbers

SUFFIX = "_raw"  # of the metrics of the weights of training


class RawEvaluation(SwappedStatistics):
    """Runs each validation of a fit, and the test after it, with the weights of training first.

    Attributes:
        evaluate_raw: Whether it does.
        raw_metrics: What the weights of training scored last, by the names of the metrics.
    """

    evaluate_raw = False

    @override
    def forget(self) -> None:
        super().forget()
        self.raw_metrics: dict[str, float] = {}

    @override
    def begin_run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().begin_run(trainer, pl_module, stage)
        if self.evaluate_raw and stage in ("fit", "test"):
            loop = trainer.fit_loop.epoch_loop.val_loop if stage == "fit" else trainer.test_loop
            evaluate = self._validate if stage == "fit" else self._test
            self.wrap(loop, "run", functools.partial(evaluate, trainer, pl_module, loop))

    def _validate(self, trainer: Trainer, pl_module: LightningModule, loop: Any, run: Callable[[], Any]) -> Any:
        self.look(trainer)
        if trainer.sanity_checking or loop.restarting or self.swapped or not self.active:
            return run()
        differ = any(map(self.ready, range(len(trainer.optimizers))))
        raw = metrics_of(trainer, pl_module, loop, run) if differ else None
        outputs = run()
        if raw is not None and raw.keys() - numbers(outputs).keys():
            rank_zero_warn(
                f"{type(self).__name__}(evaluate_raw=True): the loader of validation gives its batches once, and the "
                "weights of training have had them. Give the Trainer a DataLoader, or something that can be iterated "
                "again, or set evaluate_raw=False."
            )
        self._log_raw(trainer, numbers(outputs) if raw is None else raw)
        return outputs

    def _test(self, trainer: Trainer, pl_module: LightningModule, loop: Any, run: Callable[[], Any]) -> Any:
        with self._weights_of_training(trainer, pl_module) as raw:
            found = metrics_of(trainer, pl_module, loop, run) if raw else {}
        outputs = run()
        self._log_raw(trainer, found)
        return outputs

    @contextmanager
    def _weights_of_training(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[bool]:
        """Put the weights of training into the model, if it has the others since the end of a fit."""
        counts = self._state.get("counts", [])
        pairs = [(o, n) for o, n in zip(trainer.optimizers, counts, strict=False) if n]
        states = [(p, state) for o, _ in pairs for p, state in o.state.items() if self.slot in state]
        there = {p for p, _ in states} <= set(pl_module.parameters())  # FSDP has made others
        if trainer.ckpt_path or not self.swapped or not states or not there:
            yield False
            return
        buffers = {name: buffer.clone() for name, buffer in batch_norm_buffers(pl_module).items()}
        for each in states:
            swap(*each, self.slot)
        copy_buffers(pl_module, self._state["raw_buffers"])
        try:
            yield True
        finally:
            for each in states:
                swap(*each, self.slot)
            copy_buffers(pl_module, buffers)

    def _log_raw(self, trainer: Trainer, found: dict[str, float]) -> None:
        self.raw_metrics |= found
        values = {name + SUFFIX: value for name, value in found.items()}
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, trainer.fit_loop.epoch_loop._batches_that_stepped)  # as Lightning does
