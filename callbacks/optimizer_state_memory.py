"""Report how much memory the optimizer state takes, and what it would take in 32 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.core.routing import routes
from lightning_optim.distributed.names import named_parameters
from lightning_optim.distributed.placement import has_gradient
from lightning_optim.distributed.ranks import gathered
from lightning_optim.errors import OptionError, shown
from lightning_optim.reports.figures import can_draw
from lightning_optim.reports.memory import Entry, frozen_memory, human, model_memory, predicted_memory, state_memory
from lightning_optim.reports.memory_views import (
    OptimizerMemory,
    picture,
    scalars,
    size,
    state,
    tables,
    write_csv,
)
from lightning_optim.training.lightning_names import is_a

PREFIX = "optimizer_state"


class OptimizerStateMemory(FitCallback):
    """Print the predicted memory of the optimizer state before the first step, and log the actual memory after it.

    The tables list the bytes of the state by group and slot, with those of the same values in 32 bits; the bytes of
    parameters, gradients, state and averages; and the layers with the most state. Under several ranks they list this
    rank, all ranks, the smallest and the largest. For an optimizer of another library whose state cannot be predicted
    they are printed after the first step.

    After the first step and at the end of every epoch three numbers of the existing state are logged:
    `optimizer_state/bytes` of this rank, `.../bytes_in_32_bits`, what its values would take in 32 bits, and
    `.../bytes_all_ranks`. The rest is in the picture and in the file of `csv`.

    Args:
        table: Print the tables, and one line after the first step.
        log: Log three scalars, and with matplotlib a picture with numbers to TensorBoard.
        csv: Path of a file for the bytes of every slot of every parameter on every rank, predicted and actual.
            Default: none.

    Raises:
        OptionError: if an option has the wrong type; at the start of the fit, if the file of `csv` cannot be written.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim import AdamW
        >>> class Model(BoringModel):
        ...     def configure_optimizers(self):
        ...         return AdamW(self.parameters())
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=1, callbacks=[OptimizerStateMemory()], **options).fit(Model())
        Optimizer state of AdamW (1 rank)
        ...
        State of AdamW after the first step: 536 B (536 B predicted)

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.OptimizerStateMemory
                  init_args: {csv: memory.csv}
    """

    def __init__(self, table: bool = True, log: bool = True, csv: str | Path | None = None) -> None:
        super().__init__()
        check = functools.partial(errors.check, "OptimizerStateMemory")
        for name, value in (("table", table), ("log", log)):
            check(name, value, isinstance(value, bool), "True or False")
        check("csv", csv, csv is None or isinstance(csv, str | Path), "the path of a file, or None")
        self.table, self.scalars = table, log  # `log` is a method of Lightning's callbacks
        self.csv = None if csv is None else Path(csv)

    @override
    def forget(self) -> None:
        self._predicted: list[OptimizerMemory] = []
        self._printed = False
        self._moved: set[int] = set()  # indices of the optimizers that have taken a step in this fit
        self._reported: set[int] = set()  # those whose first step is reported
        self._drawn: dict[int, int] = {}  # bytes in the last figure of each optimizer

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.csv is not None and trainer.is_global_zero:
            try:
                write_csv(self.csv, [])
            except (OSError, ValueError) as error:
                raise OptionError(
                    f"OptimizerStateMemory: csv={shown(str(self.csv))} cannot be written ({type(error).__name__}: "
                    f"{shown(error)}). Give the path of a file, or leave csv out."
                ) from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for i, optimizer in enumerate(trainer.optimizers):
            self.undo.append(optimizer.register_step_post_hook(functools.partial(self._after_step, i)).remove)
        self._predicted = _measure(trainer, pl_module, predicted_memory, predicted=True)
        self._printed = all(state(rank) for memory in self._predicted for rank in memory.ranks)
        if self._printed:
            self._show(trainer, self._predicted)
        else:
            self._predicted = []

    def _after_step(self, i: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A step without gradients creates no state. The state cannot tell: a rank may have none, and ranks must agree.
        if i not in self._moved and any(has_gradient(p) for group in optimizer.param_groups for p in group["params"]):
            self._moved.add(i)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._moved > self._reported:
            self._report(trainer, pl_module, self.scalars and trainer.log_every_n_steps > 0)  # type: ignore[attr-defined]

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, self.scalars)

    def _report(self, trainer: Trainer, pl_module: LightningModule, log: bool) -> None:
        actual = _measure(trainer, pl_module, state_memory)
        if not self._printed:
            self._show(trainer, actual)
        if self.table and trainer.is_global_zero:
            for i in sorted(self._moved - self._reported):
                Console().print(self._line(trainer, i, actual[i]))
        self._printed, self._reported = True, set(self._moved)
        if log:
            self._log(trainer, actual)
        if self.csv is not None and trainer.is_global_zero:
            write_csv(self.csv, [("predicted", self._predicted), ("actual", actual)])

    def _show(self, trainer: Trainer, memories: Sequence[OptimizerMemory]) -> None:
        if self.table and trainer.is_global_zero:
            for table in (table for memory in memories for table in tables(memory)):
                Console().print(table)

    def _line(self, trainer: Trainer, i: int, memory: OptimizerMemory) -> str:
        words = f"State of {memory.title} after the first step: {human(size(memory.first))}"
        if self._predicted:
            words += f" ({human(size(self._predicted[i].first))} predicted)"
        peak = _peak(trainer)
        return words if peak is None else f"{words}; peak of the device {human(peak)}"

    def _log(self, trainer: Trainer, memories: Sequence[OptimizerMemory]) -> None:
        for i, memory in enumerate(memories):
            prefix = PREFIX if len(memories) == 1 else f"{PREFIX}/{i}"
            values = {f"{prefix}/{key}": value for key, value in scalars(memory, trainer.global_rank).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)
            self._draw(trainer, memory, i, prefix)

    def _draw(self, trainer: Trainer, memory: OptimizerMemory, i: int, prefix: str) -> None:
        """Log a figure, if the bytes have changed since the last one."""
        boards: list[Any] = [logger for logger in trainer.loggers if is_a(logger, TensorBoardLogger)]
        now = size(memory.first)
        if not (boards and trainer.is_global_zero and can_draw(type(self).__name__)) or self._drawn.get(i, 0) == now:
            return
        self._drawn[i] = now
        for logger in boards:
            logger.experiment.add_figure(f"{prefix}/bars", picture(memory), trainer.global_step)


def _measure(
    trainer: Trainer,
    pl_module: LightningModule,
    count: Callable[[torch.optim.Optimizer, dict[Tensor, str]], list[Entry]],
    predicted: bool = False,
) -> list[OptimizerMemory]:
    """The memory of every optimizer on every rank. Frozen parameters are counted with the first optimizer."""
    names: dict[Tensor, str] = {p: name for name, p in named_parameters(pl_module)}
    for i, p in enumerate(p for o in trainer.optimizers for group in o.param_groups for p in group["params"]):
        names.setdefault(p, f"parameter {i}")  # not in the module, or flat
    memories = []
    for i, optimizer in enumerate(trainer.optimizers):
        model = model_memory(optimizer, names, predicted)
        if all(entry.kind == "parameter" for entry in model):  # freed already; those of the next step
            model = model_memory(optimizer, names, predicted=True)
        entries = [*model, *count(optimizer, names)]
        if i == 0:
            entries += frozen_memory(trainer.optimizers, names)
        groups = [str(group.get("name", j)) for j, group in enumerate(optimizer.param_groups)]
        of_rules = routes(optimizer) if isinstance(optimizer, Optimizer) else []
        memories.append(OptimizerMemory(type(optimizer).__name__, groups, gathered(entries), of_rules))
    return memories


def _peak(trainer: Trainer) -> int | None:
    """The peak of allocated bytes on this rank's CUDA device since the process started; None on other devices."""
    device = trainer.strategy.root_device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
