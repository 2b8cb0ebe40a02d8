"""Run a loop of validation or test once more, with other weights in the model, while nobody notices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from lightning_optim.analysis.closures import generators_kept
from lightning_optim.training.lightning_names import is_a
from lightning_optim.training.without_trace import kept

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

METRICS = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")  # of Lightning's logger connector


def metrics_of(trainer: Trainer, module: LightningModule, loop: Any, run: Callable[[], Any]) -> dict[str, float]:
    """What a loop of validation or test logs, without its being logged.

    The hooks of the module, of the strategy and of the progress bar are called, those of other callbacks are not.
    Afterwards the progress of the loop, the metrics of the Trainer, generators of random numbers and what a step
    changes in the module are as before. Files and objects of other kinds that a step writes are written.

    Args:
        trainer: The Trainer, in the stage of the loop.
        module: Its module.
        loop: The loop.
        run: Runs it.

    Returns:
        The metrics by name, as loggers get them.
    """
    with _unnoticed(trainer, module, loop):
        return numbers(run())


def numbers(outputs: list[dict[str, Any]]) -> dict[str, float]:
    """What a loop returns, a dict for each loader, in one dict of floats."""
    return {name: float(value) for of_loader in outputs for name, value in of_loader.items()}


@contextmanager
def _unnoticed(trainer: Any, module: LightningModule, loop: Any) -> Iterator[None]:
    connector = trainer._logger_connector
    modes: list[tuple[nn.Module, bool]] = []  # where an exception ends the evaluation, as one in any other leaves them
    with ExitStack() as stack:
        stack.callback(_set_modes, modes)
        stack.enter_context(generators_kept())
        for owner, names in ((trainer, ("callbacks", "loggers", "should_stop")), (connector, METRICS)):
            for name in names:
                stack.callback(setattr, owner, name, getattr(owner, name))
        for name in METRICS:
            setattr(connector, name, dict(getattr(connector, name)))
        trainer.callbacks = [callback for callback in trainer.callbacks if is_a(callback, ProgressBar)]
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        stack.callback(setattr, loop, "verbose", loop.verbose)
        loop.verbose = False
        stack.callback(loop.batch_progress.load_state_dict, copy.deepcopy(loop.batch_progress.state_dict()))
        stack.callback(setattr, loop, "_seen_batches_per_dataloader", copy.copy(loop._seen_batches_per_dataloader))
        for undo in kept(trainer.strategy.model or module, module, parameters=False):
            stack.callback(undo)
        try:
            yield
        except BaseException:
            modes += [(part, part.training) for part in module.modules()]
            raise


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, mode in modes:
        part.training = mode
