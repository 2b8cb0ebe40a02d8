"""The base of callbacks that look at the training loss on fixed batches while training does not notice."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.progress import Progress
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.products import Products, Way, products_of
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.distributed.placement import is_sharded
from lightning_optim.errors import is_whole
from lightning_optim.reports.figures import can_draw
from lightning_optim.training import extra_pass
from lightning_optim.training.fixed_loss import FixedLoss
from lightning_optim.training.lightning_names import is_a

DELAY = 3.0  # seconds of a look after which its progress is shown
Tick = Callable[[], None]


class LookingCallback(FitCallback):
    """Looks before the first step, and every so many steps; what it finds is logged and kept.

    A look runs `training_step` without a trace on batches that stay the same. What makes a look fail is said once, and
    training goes on.

    Args:
        every_n_steps: Optimizer steps from one look to the next.
        batches: Number of training batches of each rank to look at. Their graphs are held at once.
        seed: Which batches these are, and the seed of random vectors.

    Attributes:
        history: What each look has found, by name, with the step. It is saved with checkpoints.

    Raises:
        OptionError: if an option is out of range; at the start of training, if the loader gives its batches only once.
    """

    prefix: str  # of the names in logs

    def __init__(self, every_n_steps: int, batches: int, seed: int) -> None:
        super().__init__()
        check = functools.partial(errors.check, type(self).__name__)
        for name, value in (("every_n_steps", every_n_steps), ("batches", batches)):
            check(name, value, is_whole(value), "an integer of at least 1")
        check("seed", seed, is_whole(seed, 0) and seed < 2**63, "an integer of at least 0, below 2^63")
        self.every_n_steps, self.batches, self.seed = int(every_n_steps), int(batches), int(seed)

    def look(self, trainer: Trainer, times: Products, tick: Tick) -> dict[str, float]:
        """What there is to see.

        Args:
            trainer: The Trainer.
            times: Products with the Hessian of the loss.
            tick: To be called after each product.

        Returns:
            Numbers by name, the same on every rank; NaN for what is not known, which is left out.
        """
        raise NotImplementedError

    def products(self) -> int:
        """The number of products in a look, for its progress bar."""
        raise NotImplementedError

    def draw(self, trainer: Trainer) -> Mapping[str, Any]:
        """Figures of the last look by name. Called where they can be logged."""
        return {}

    @override
    def forget(self) -> None:
        self.history: list[dict[str, float]] = []
        self.fixed: FixedLoss | None = None
        self._way: Way | None = None
        self._turn = 0
        self._warned: set[str] = set()

    @override
    def release(self) -> None:
        super().release()
        self.fixed = None

    # ------------------------------------------------------------------ hooks

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fixed = FixedLoss(trainer, pl_module, self.batches, self.seed, type(self).__name__)
        self._turn = trainer.global_step // self.every_n_steps
        if trainer.global_step == 0:
            self.attempt(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        turn = trainer.global_step // self.every_n_steps  # manual optimization may take several steps in a batch
        if turn > self._turn:
            self._turn = turn
            self.attempt(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(found) for found in self.history]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(found) for found in state_dict["history"]]

    # ------------------------------------------------------------------ a look

    def attempt(self, trainer: Trainer) -> None:
        """Look now, log what there is, and say once what went wrong."""
        assert self.fixed is not None
        params = list(self.fixed.parameters().values())
        way = self._way or ("differences" if any(map(is_sharded, params)) else None)
        name = type(self).__name__
        if not params:
            self.warn_once(f"{name} cannot look: no parameter is trained. Is the model frozen? Training goes on.")
            return
        try:
            with (
                self.fixed.look() as closure,
                _progress(trainer, name, self.products()) as tick,
                products_of(name, closure, params, products=way) as times,
            ):
                seen = self.look(trainer, times, tick)
                self._way, loss = times.way, times.loss
        except Exception as error:  # a step may raise anything out of training mode; training goes on
            why = extra_pass.reason(trainer.lightning_module, error).removeprefix(f"{name}: ")
            self.warn_once(f"{name} cannot look at step {trainer.global_step}: {why} Training goes on.")
            return
        found = {name: value for name, value in seen.items() if not math.isnan(value)}
        self.history.append({"step": trainer.global_step, "loss": loss, **found})
        self._log(trainer, found)

    def warn_once(self, message: str) -> None:
        """Warn, unless something that begins alike was said in this fit."""
        kind = message.partition(":")[0].rstrip("0123456789 ")
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(message)

    def _log(self, trainer: Trainer, found: Mapping[str, float]) -> None:
        values = {f"{self.prefix}/{name}": value for name, value in found.items()}
        if not trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
        boards: list[Any] = [logger for logger in trainer.loggers if is_a(logger, TensorBoardLogger)]
        if boards and trainer.is_global_zero and can_draw(type(self).__name__):
            for title, figure in self.draw(trainer).items():
                for logger in boards:
                    logger.experiment.add_figure(f"{self.prefix}/{title}", figure, trainer.global_step)


@contextmanager
def _progress(trainer: Trainer, name: str, products: int) -> Iterator[Tick]:
    """A progress bar, once a look takes longer than a few seconds."""
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    bar = Progress(console=Console(), transient=True)  # a console of its own: that of Lightning's bar may be live
    task, begin, count = bar.add_task(name, total=products), time.monotonic(), itertools.count(1)

    def tick() -> None:
        bar.update(task, completed=next(count))
        if shown and not bar.live.is_started and time.monotonic() - begin > DELAY:
            bar.start()

    try:
        yield tick
    finally:
        if bar.live.is_started:
            bar.stop()
