"""The memory of a run for people: tables, a picture, a file."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_optim.reports.memory import KINDS, Entry, human, summed

TOP = 10  # layers that are shown by name
WORDS = {"parameter": "parameters", "gradient": "gradients", "state": "state", "stage": "averages and the like"}
COLUMNS: tuple[str, ...] = ("when", "optimizer", "rank", "kind", "group", "layer", "parameter", "slot", "type")
COLUMNS += ("values", "bytes", "bytes_in_32_bits")


@dataclass(frozen=True)
class Census:
    """What one optimizer has on every rank.

    Attributes:
        title: The optimizer's class.
        groups: Names of its groups.
        ranks: The entries of each rank.
    """

    title: str
    groups: Sequence[str]
    ranks: Sequence[Sequence[Entry]]

    @property
    def first(self) -> list[Entry]:
        """State of rank 0, its stages' included."""
        return state(self.ranks[0])

    def every(self, kind: str | None = None) -> list[Entry]:
        """The entries of all ranks, of one kind or all."""
        return [entry for rank in self.ranks for entry in rank if kind in (None, entry.kind)]


def state(entries: Iterable[Entry]) -> list[Entry]:
    """Those entries that stand in the optimizer's state."""
    return [entry for entry in entries if entry.kind in ("state", "stage")]


def size(entries: Iterable[Entry]) -> int:
    """Their bytes together."""
    return sum(entry.bytes for entry in entries)


def size_32(entries: Iterable[Entry]) -> int:
    """What their values take in 32 bits each."""
    return sum(entry.bytes_32 for entry in entries)


def scalars(census: Census, rank: int) -> dict[str, float]:
    """What is logged: the bytes of one rank and of all, and of the rank by slot, type, group and largest layers."""
    own = state(census.ranks[rank])
    each = [size(state(entries)) for entries in census.ranks]
    values = {"bytes": each[rank], "bytes_all_ranks": sum(each), "bytes_in_32_bits": size_32(own)}
    values |= {"bytes_smallest_rank": min(each), "bytes_largest_rank": max(each)}
    for kind in ("parameter", "gradient", "stage"):
        values[f"kind/{kind}"] = size(entry for entry in census.ranks[rank] if entry.kind == kind)
    for key in ("slot", "dtype", "group"):
        values |= {f"{key}/{name}": entry.bytes for (name,), entry in summed(own, key).items()}
    values |= {f"layer/{layer}": entry.bytes for layer, entry in largest_layers(own)}
    return {name: float(value) for name, value in values.items()}


def largest_layers(entries: Iterable[Entry]) -> list[tuple[str, Entry]]:
    """The layers with the most state, the largest first."""
    found = summed((entry for entry in entries if entry.name), "layer")
    by_size = sorted(found.items(), key=lambda item: -item[1].bytes)
    return [(layer, entry) for (layer,), entry in by_size[:TOP]]


def tables(census: Census) -> list[Table]:
    """By group and slot; by what it is for; and the largest layers."""
    return [_slots(census), _kinds(census), _layers(census)]


def _slots(census: Census) -> Table:
    ranks = len(census.ranks)
    table = Table(title=f"Optimizer state of {census.title} ({ranks} rank{'s' if ranks > 1 else ''})")
    for column in ("group", "slot", "type"):
        table.add_column(column, overflow="fold")
    for column in ("values", *(("bytes",) if ranks == 1 else ("this rank", "all ranks")), "in 32 bits"):
        table.add_column(column, justify="right")
    here = summed(census.first, "group", "slot", "dtype")
    total = summed(state(census.every()), "group", "slot", "dtype")

    def row(label: Sequence[str], entry: Iterable[Entry], all_ranks: int) -> None:
        found = list(entry)
        sizes = (size(found),) if ranks == 1 else (size(found), all_ranks)
        elements = sum(one.elements for one in found)
        table.add_row(*label, f"{elements:,}", *(human(value) for value in (*sizes, size_32(found))))

    for key, entry in total.items():  # FSDP1 leaves some ranks without a slot
        found = [here[key]] if key in here else []
        row((census.groups[entry.group], entry.slot, entry.dtype), found, entry.bytes)
    table.add_section()
    row(("total", "", ""), census.first, size(state(census.every())))
    return table


def _kinds(census: Census) -> Table:
    each = len(census.ranks) > 1
    table = Table(title=f"Memory of {census.title}")
    table.add_column("what", overflow="fold")
    for column in ("this rank", "all ranks", "smallest", "largest") if each else ("bytes",):
        table.add_column(column, justify="right")
    for kind in KINDS:
        sizes = [size(entry for entry in rank if entry.kind == kind) for rank in census.ranks]
        if any(sizes):
            shown = (sizes[0], sum(sizes), min(sizes), max(sizes)) if each else (sizes[0],)
            table.add_row(WORDS[kind], *map(human, shown))
    return table


def _layers(census: Census) -> Table:
    table = Table(title="Largest in state")
    table.add_column("layer", overflow="fold")
    for column in ("bytes", "in 32 bits"):
        table.add_column(column, justify="right")
    for layer, entry in largest_layers(census.first):
        table.add_row(layer, human(entry.bytes), human(entry.bytes_32))
    return table


def write_csv(path: Path, found: Sequence[tuple[str, Sequence[Census]]]) -> None:
    """One line for each slot of each parameter on each rank.

    Args:
        path: The file, which is replaced.
        found: "predicted" or "actual", and the optimizers then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for when, optimizers in found:
            for i, census in enumerate(optimizers):
                for rank, entries in enumerate(census.ranks):
                    for e in entries:
                        group = census.groups[e.group] if e.group >= 0 else ""
                        sizes = (e.elements, e.bytes, e.bytes_32)
                        writer.writerow((when, i, rank, e.kind, group, e.layer, e.name, e.slot, e.dtype, *sizes))


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def picture(census: Census) -> Any:
    """Bars on a matplotlib figure: each slot as it is kept and in 32 bits, and the largest layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    slots = [(slot, entry) for (slot,), entry in summed(census.first, "slot").items()]
    for axis, title, bars in ((left, "by slot", slots), (right, "largest layers", largest_layers(census.first))):
        places = range(len(bars))
        axis.barh([y - 0.2 for y in places], [entry.bytes / 1e6 for _, entry in bars], 0.4, label="kept")
        axis.barh([y + 0.2 for y in places], [entry.bytes_32 / 1e6 for _, entry in bars], 0.4, label="in 32 bits")
        axis.set_yticks(list(places), [label for label, _ in bars])
        axis.invert_yaxis()
        axis.set_xlabel("MB")
        axis.set_title(title)
    left.legend()
    figure.suptitle(f"Optimizer state of {census.title}: {human(size(census.first))}, rank 0")
    return figure
