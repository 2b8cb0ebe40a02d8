"""How much memory the optimizer's state takes, and what it would take in 32 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_optim.memory import Entry, human, predicted_memory, state_memory

PREFIX = "optimizer_state"


class OptimizerStateMemory(Callback):
    """A table of the state's bytes when the fit starts, and scalars for the logger once the state exists.

    The table counts, for each group and slot, the values and bytes on this rank, the bytes of all ranks together,
    and what the same values take in 32 bits. It is what the first step will make; after the first step, and at the
    end of every epoch, what exists is logged as `optimizer_state/...` in bytes. An optimizer of another library
    that cannot be asked beforehand gets its table after the first step.

    Args:
        table: Print the table.
        log: Send scalars to the Trainer's loggers.
    """

    def __init__(self, table: bool = True, log: bool = True) -> None:
        self.table, self.scalars = table, log  # `log` is what Lightning calls its own method here
        self._printed = False
        self._logged = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed = self._logged = False
        entries = [predicted_memory(optimizer) for optimizer in trainer.optimizers]
        if all(entries):
            self._print(trainer, entries)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._logged and any(optimizer.state for optimizer in trainer.optimizers):
            self._report(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        self._logged = True
        entries = [state_memory(optimizer) for optimizer in trainer.optimizers]
        if not self._printed:
            self._print(trainer, entries)
        if not self.scalars:
            return
        for i, found in enumerate(entries):
            prefix = PREFIX if len(entries) == 1 else f"{PREFIX}/{i}"
            values = scalars(found, _over_ranks(trainer, found))
            for logger in trainer.loggers:
                logger.log_metrics({f"{prefix}/{key}": value for key, value in values.items()}, trainer.global_step)

    def _print(self, trainer: Trainer, entries: Sequence[Sequence[Entry]]) -> None:
        self._printed = True
        for optimizer, found in zip(trainer.optimizers, entries, strict=True):
            total = _over_ranks(trainer, found)
            names = [str(group.get("name", i)) for i, group in enumerate(optimizer.param_groups)]
            if self.table:
                _show(table_of(type(optimizer).__name__, names, found, total, trainer.world_size))


def scalars(entries: Sequence[Entry], all_ranks: Sequence[int]) -> dict[str, float]:
    """What is logged: bytes on this rank and on all, in 32 bits, and by slot, type and group."""
    size = sum(entry.bytes for entry in entries)
    values = {
        "bytes": float(size),
        "bytes_all_ranks": float(sum(all_ranks)),
        "bytes_in_32_bits": float(sum(entry.bytes_32 for entry in entries)),
    }
    for kind in ("slot", "dtype", "group"):
        for entry in entries:
            key = f"{kind}/{getattr(entry, kind)}"
            values[key] = values.get(key, 0.0) + entry.bytes
    return values


def table_of(
    name: str, groups: Sequence[str], entries: Sequence[Entry], all_ranks: Sequence[int], world_size: int
) -> Table:
    """The table that is printed."""
    table = Table(title=f"Optimizer state of {name} ({world_size} rank{'s' if world_size > 1 else ''})")
    for column in ("group", "slot", "type"):
        table.add_column(column, overflow="fold")
    for column in ("values", *(("bytes",) if world_size == 1 else ("this rank", "all ranks")), "in 32 bits"):
        table.add_column(column, justify="right")

    def row(label: Sequence[str], counted: Sequence[Entry], total: int) -> None:
        size = sum(entry.bytes for entry in counted)
        sizes = (size,) if world_size == 1 else (size, total)
        in_32 = sum(entry.bytes_32 for entry in counted)
        table.add_row(*label, f"{sum(entry.elements for entry in counted):,}", *map(human, (*sizes, in_32)))

    for entry, total in zip(entries, all_ranks, strict=True):
        row((groups[entry.group], entry.slot, entry.dtype), [entry], total)
    table.add_section()
    row(("total", "", ""), entries, sum(all_ranks))
    return table


def _over_ranks(trainer: Trainer, entries: Sequence[Entry]) -> list[int]:
    """The bytes of each entry summed over ranks; every rank has the same entries in the same order."""
    sizes = torch.tensor([entry.bytes for entry in entries], dtype=torch.float64, device=trainer.strategy.root_device)
    total: Any = trainer.strategy.reduce(sizes, reduce_op="sum")
    return [int(size) for size in total.tolist()]


@rank_zero_only
def _show(table: Table) -> None:
    Console().print(table)
