"""The memory of optimizers for people: tables, a figure, a CSV file, and scalars for loggers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_optim.core.routing import Route, by_rule
from lightning_optim.reports.figures import new_figure
from lightning_optim.reports.memory import Entry, Kind, human, summed

TOP = 10  # number of layers to list
WORDS: dict[Kind, str] = {
    "parameter": "parameters",
    "gradient": "gradients",
    "state": "state",
    "stage": "averages and the like",
    "temporary": "temporary, while other weights are evaluated",
}
COLUMNS: tuple[str, ...] = ("when", "optimizer", "rank", "kind", "group", "layer", "parameter", "slot", "type")
COLUMNS += ("values", "bytes", "bytes_in_32_bits")


@dataclass(frozen=True)
class OptimizerMemory:
    """The memory of one optimizer on every rank.

    Attributes:
        title: The name of the optimizer's class.
        groups: Names of its parameter groups.
        ranks: The entries of each rank.
        routes: The rule of each parameter, for an optimizer that has several.
    """

    title: str
    groups: Sequence[str]
    ranks: Sequence[Sequence[Entry]]
    routes: Sequence[Route] = ()

    @property
    def first(self) -> list[Entry]:
        """The state on rank 0, with the slots of stages and what is temporary."""
        return state(self.ranks[0])

    def every(self, kind: str | None = None) -> list[Entry]:
        """The entries of all ranks, of one kind or of all kinds."""
        return [entry for rank in self.ranks for entry in rank if kind in (None, entry.kind)]


def state(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that are optimizer state, with the slots of stages and what is temporary."""
    return [entry for entry in entries if entry.kind in ("state", "stage", "temporary")]


def size(entries: Iterable[Entry]) -> int:
    """The sum of the bytes."""
    return sum(entry.bytes for entry in entries)


def size_32(entries: Iterable[Entry]) -> int:
    """The bytes that the values would take in 32 bits."""
    return sum(entry.bytes_32 for entry in entries)


def scalars(memory: OptimizerMemory, rank: int) -> dict[str, float]:
    """The three numbers to log: bytes of state of one rank, what its values take in 32 bits, and bytes of all ranks."""
    here = state(memory.ranks[rank])
    values = {"bytes": size(here), "bytes_in_32_bits": size_32(here), "bytes_all_ranks": size(state(memory.every()))}
    return {name: float(value) for name, value in values.items()}


def largest_layers(entries: Iterable[Entry]) -> list[tuple[str, Entry]]:
    """The layers with the most state, the largest first."""
    layers = summed((entry for entry in entries if entry.name), "layer")
    by_size = sorted(layers.items(), key=lambda item: -item[1].bytes)
    return [(layer, entry) for (layer,), entry in by_size[:TOP]]


def tables(memory: OptimizerMemory) -> list[Table]:
    """The state by group and slot; the bytes by kind; and the largest layers."""
    return [_slots(memory), _kinds(memory), _layers(memory), *([_routes(memory)] if memory.routes else [])]


def _slots(memory: OptimizerMemory) -> Table:
    ranks = len(memory.ranks)
    table = Table(title=f"Optimizer state of {memory.title} ({ranks} rank{'s' if ranks > 1 else ''})")
    for column in ("group", "slot", "type"):
        table.add_column(column, overflow="fold")
    for column in ("values", *(("bytes",) if ranks == 1 else ("this rank", "all ranks")), "in 32 bits"):
        table.add_column(column, justify="right")
    here = summed(memory.first, "group", "slot", "dtype")
    total = summed(state(memory.every()), "group", "slot", "dtype")

    def add_row(label: Sequence[str], entries: Sequence[Entry], all_ranks: int) -> None:
        sizes = (size(entries),) if ranks == 1 else (size(entries), all_ranks)
        elements = sum(entry.elements for entry in entries)
        table.add_row(*label, f"{elements:,}", *(human(value) for value in (*sizes, size_32(entries))))

    for key, entry in total.items():  # under FSDP1 some ranks may not have a slot at all
        on_this_rank = [here[key]] if key in here else []
        add_row((memory.groups[entry.group], entry.slot, entry.dtype), on_this_rank, entry.bytes)
    table.add_section()
    add_row(("total", "", ""), memory.first, size(state(memory.every())))
    return table


def _kinds(memory: OptimizerMemory) -> Table:
    several = len(memory.ranks) > 1
    table = Table(title=f"Memory of {memory.title}")
    table.add_column("what", overflow="fold")
    for column in ("this rank", "all ranks", "smallest", "largest") if several else ("bytes",):
        table.add_column(column, justify="right")
    for kind, word in WORDS.items():
        sizes = [size(entry for entry in rank if entry.kind == kind) for rank in memory.ranks]
        if any(sizes):
            shown = (sizes[0], sum(sizes), min(sizes), max(sizes)) if several else (sizes[0],)
            table.add_row(word, *map(human, shown))
    return table


def _layers(memory: OptimizerMemory) -> Table:
    table = Table(title="Largest in state")
    table.add_column("layer", overflow="fold")
    for column in ("bytes", "in 32 bits"):
        table.add_column(column, justify="right")
    for layer, entry in largest_layers(memory.first):
        table.add_row(layer, human(entry.bytes), human(entry.bytes_32))
    return table


def _routes(memory: OptimizerMemory) -> Table:
    """Each rule with its share, and every tensor of two axes or more that is no matrix."""
    table = Table(title=f"Routing of {memory.title}")
    for column in ("rule", "parameter", "why"):
        table.add_column(column, overflow="fold")
    table.add_column("elements", justify="right")
    for rule, routes in by_rule(memory.routes).items():
        table.add_section()
        tensors = f"{len(routes)} tensor{'' if len(routes) == 1 else 's'}"
        table.add_row(rule, tensors, "", f"{sum(route.elements for route in routes):,}")
        for route in routes:
            if route.is_special:
                table.add_row("", f"{route.name} {[*route.shape]}", route.reason, f"{route.elements:,}")
    return table


def write_csv(path: Path, memories: Sequence[tuple[str, Sequence[OptimizerMemory]]]) -> None:
    """Write one line for each slot of each parameter on each rank.

    Args:
        path: Path of the file, which is overwritten.
        memories: Pairs of "predicted" or "actual" and the memory of all optimizers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for when, optimizers in memories:
            for i, memory in enumerate(optimizers):
                for rank, entries in enumerate(memory.ranks):
                    for e in entries:
                        group = memory.groups[e.group] if e.group >= 0 else ""
                        sizes = (e.elements, e.bytes, e.bytes_32)
                        writer.writerow((when, i, rank, e.kind, group, e.layer, e.name, e.slot, e.dtype, *sizes))


def picture(memory: OptimizerMemory) -> Any:
    """A matplotlib figure of rank 0: bytes by what they are for, by slot, and of the largest layers, with numbers."""
    kinds = [(word, [entry for entry in memory.ranks[0] if entry.kind == kind]) for kind, word in WORDS.items()]
    slots = [(slot, [entry]) for (slot,), entry in summed(memory.first, "slot").items()]
    layers = [(layer, [entry]) for layer, entry in largest_layers(memory.first)]
    panels = {"memory": [bar for bar in kinds if bar[1]], "state by slot": slots, "state by layer": layers}
    rows = max(map(len, panels.values()))
    figure = new_figure(14, 1.6 + 0.45 * max(rows, 4))
    for axis, (title, bars) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _draw_bars(axis, bars)
        axis.set_title(title)
    fewer = size(memory.first) != size_32(memory.first)
    in_32 = f", in 32 bits {human(size_32(memory.first))}" if fewer else ""
    ranks = "" if len(memory.ranks) == 1 else f" on rank 0 of {len(memory.ranks)}"
    figure.suptitle(f"Optimizer state of {memory.title}: {human(size(memory.first))}{in_32}{ranks}")
    return figure


def _draw_bars(axis: Any, bars: Sequence[tuple[str, Sequence[Entry]]]) -> None:
    """Horizontal bars with their bytes, each above what it would be in 32 bits where that is another number."""
    for row, (_, entries) in enumerate(bars):
        kept, in_32 = size(entries), size_32(entries)
        thick = 0.7 if kept == in_32 else 0.35
        axis.barh(row - (0.7 - thick) / 2, kept, thick, color="C0")
        axis.text(kept, row - (0.7 - thick) / 2, f" {human(kept)}", va="center", fontsize=9)
        if kept != in_32:
            axis.barh(row + 0.175, in_32, thick, color="C0", alpha=0.3)
            axis.text(in_32, row + 0.175, f" {human(in_32)} in 32 bits", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [label for label, _ in bars])
    axis.invert_yaxis()
    axis.margins(x=0.55)  # for the numbers
    axis.set_xlim(left=0)
    axis.xaxis.set_visible(False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
