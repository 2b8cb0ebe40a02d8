"""How much memory the optimizer's state takes, and what it would take in 32 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.distributed.names import plain_name
from lightning_optim.distributed.placement import has_gradient
from lightning_optim.distributed.ranks import gathered
from lightning_optim.reports.memory import Entry, frozen_memory, human, model_memory, predicted_memory, state_memory
from lightning_optim.reports.memory_views import Census, can_draw, picture, scalars, size, state, tables, write_csv

PREFIX = "optimizer_state"


class OptimizerStateMemory(Callback):
    """Tables of the memory when the fit starts, and scalars, a picture and a file once the state exists.

    The tables count the state by group and slot, with what the same values take in 32 bits; parameters, gradients,
    state and averages; and the layers with the most state: on this rank, on all, and on the smallest and largest. They
    are what the first step will make; after the first step that moved parameters, and at the end of every epoch, what
    exists is logged as `optimizer_state/...` in bytes. An optimizer of another library that cannot be asked beforehand
    gets its tables after the first step.

    Args:
        table: Print the tables, and a line after the first step.
        log: Send scalars to the Trainer's loggers, and to TensorBoard a picture where matplotlib is installed.
        csv: A file for every slot of every parameter on every rank, predicted and actual; by default none.

    Raises:
        OptionError: where an option is of another type.
    """

    def __init__(self, table: bool = True, log: bool = True, csv: str | Path | None = None) -> None:
        check = functools.partial(errors.check, "OptimizerStateMemory")
        for name, value in (("table", table), ("log", log)):
            check(name, value, isinstance(value, bool), "True or False")
        check("csv", csv, csv is None or isinstance(csv, str | Path), "the path of a file, or None")
        self.table, self.scalars = table, log  # `log` is what Lightning calls its own method here
        self.csv = None if csv is None else Path(csv)
        self._predicted: list[Census] = []
        self._printed = False
        self._moved: set[int] = set()  # optimizers that have taken a real step in this fit
        self._told: set[int] = set()  # and those of which that is reported
        self._drawn: dict[int, int] = {}  # bytes on the last picture of each optimizer
        self._undo: list[Callable[[], None]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._moved, self._told, self._drawn = set(), set(), {}
        for i, optimizer in enumerate(trainer.optimizers):
            self._undo.append(optimizer.register_step_post_hook(functools.partial(self._after_step, i)).remove)
        self._predicted = _census(trainer, pl_module, predicted_memory, predicted=True)
        self._printed = all(state(rank) for census in self._predicted for rank in census.ranks)
        if self._printed:
            self._show(trainer, self._predicted)
        else:
            self._predicted = []

    def _after_step(self, i: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A step without a gradient makes no state. Not whether there is state: ranks must agree.
        if i not in self._moved and any(has_gradient(p) for group in optimizer.param_groups for p in group["params"]):
            self._moved.add(i)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._moved > self._told:
            self._report(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._undo:
            self._undo.pop()()

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = _census(trainer, pl_module, state_memory)
        if not self._printed:
            self._show(trainer, found)
        if self.table and trainer.is_global_zero:
            for i in sorted(self._moved - self._told):
                Console().print(self._line(trainer, i, found[i]))
        self._printed, self._told = True, set(self._moved)
        if self.scalars:
            self._log(trainer, found)
        if self.csv is not None and trainer.is_global_zero:
            write_csv(self.csv, [("predicted", self._predicted), ("actual", found)])

    def _show(self, trainer: Trainer, found: Sequence[Census]) -> None:
        if self.table and trainer.is_global_zero:
            for table in (table for census in found for table in tables(census)):
                Console().print(table)

    def _line(self, trainer: Trainer, i: int, census: Census) -> str:
        words = f"State of {census.title} after the first step: {human(size(census.first))}"
        if self._predicted:
            words += f" ({human(size(self._predicted[i].first))} predicted)"
        peak = _peak(trainer)
        return words if peak is None else f"{words}; peak of the device {human(peak)}"

    def _log(self, trainer: Trainer, found: Sequence[Census]) -> None:
        for i, census in enumerate(found):
            prefix = PREFIX if len(found) == 1 else f"{PREFIX}/{i}"
            values = scalars(census, trainer.global_rank)
            if self._predicted:
                values["bytes_predicted"] = float(size(state(self._predicted[i].ranks[trainer.global_rank])))
            if (peak := _peak(trainer)) is not None:
                values["cuda_peak"] = float(peak)
            for logger in trainer.loggers:
                logger.log_metrics({f"{prefix}/{key}": value for key, value in values.items()}, trainer.global_step)
            self._draw(trainer, census, i, prefix)

    def _draw(self, trainer: Trainer, census: Census, i: int, prefix: str) -> None:
        """A picture where the last one is not right any more."""
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        now = size(census.first)
        if not (boards and trainer.is_global_zero and can_draw()) or self._drawn.get(i, 0) == now:
            return
        self._drawn[i] = now
        for logger in boards:
            board: Any = logger.experiment
            board.add_figure(f"{prefix}/bars", picture(census), trainer.global_step)


def _census(
    trainer: Trainer,
    pl_module: LightningModule,
    count: Callable[[torch.optim.Optimizer, dict[Tensor, str]], list[Entry]],
    predicted: bool = False,
) -> list[Census]:
    """What every optimizer has on every rank. Parameters that none has count with the first."""
    names: dict[Tensor, str] = {p: plain_name(name) for name, p in pl_module.named_parameters()}
    for i, p in enumerate(p for o in trainer.optimizers for group in o.param_groups for p in group["params"]):
        names.setdefault(p, f"parameter {i}")  # of no module, or flat
    found = []
    for i, optimizer in enumerate(trainer.optimizers):
        model = model_memory(optimizer, names, predicted)
        if all(entry.kind == "parameter" for entry in model):  # let go before validation: those of the next step
            model = model_memory(optimizer, names, predicted=True)
        entries = [*model, *count(optimizer, names)]
        if i == 0:
            entries += frozen_memory(trainer.optimizers, names)
        groups = [str(group.get("name", j)) for j, group in enumerate(optimizer.param_groups)]
        found.append(Census(type(optimizer).__name__, groups, gathered(entries)))
    return found


def _peak(trainer: Trainer) -> int | None:
    """The most bytes that tensors have taken on this rank's CUDA device since the process began, or None on others."""
    device = trainer.strategy.root_device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
