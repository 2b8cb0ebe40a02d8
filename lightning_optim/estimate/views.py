"""An estimate of memory for people: tables, sentences and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from lightning_optim.estimate.result import KINDS, MemoryEstimate, OptimizerEstimate
from lightning_optim.reports.figures import new_figure
from lightning_optim.reports.memory import Kind, human

# Columns of the table and parts of the picture, in their order.
TITLES: dict[Kind, str] = {
    "parameter": "parameters",
    "gradient": "gradients",
    "state": "state",
    "stage": "averages",
    "buffer": "module buffers",
    "communication": "communication*",
    "exchange": "matrices in a step*",
}
LABEL, COLUMN = 24, 13  # characters of the first column of a table, and of others
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#bbbbbb", "#ee6677", "#aa3377", "#dddddd")


def tables(estimate: MemoryEstimate, width: int = 80) -> list[Table]:
    """What each optimizer takes on the rank with the most, and the state of the first by slot.

    Args:
        estimate: The estimate.
        width: Columns of the terminal.
    """
    of_table: list[list[OptimizerEstimate]] = [[]]
    for name in dict.fromkeys(one.name for one in estimate.optimizers):  # the bits of one side by side
        own = [one for one in estimate.optimizers if one.name == name]
        if of_table[-1] and len(of_table[-1]) + len(own) > max(1, (width - LABEL) // COLUMN):
            of_table.append([])
        of_table[-1] += own
    return [*(_comparison(estimate, ones) for ones in of_table), _slots(estimate, of_table[0][0])]


def title(estimate: MemoryEstimate) -> str:
    """What the tables are about."""
    where = "on the rank with the most" if estimate.spread.ranks > 1 else "on one device"
    return f"Memory of {estimate.module}, {count(estimate.parameters)} parameters, {where}: {estimate.spread.title}"


def _comparison(estimate: MemoryEstimate, ones: Sequence[OptimizerEstimate]) -> Table:
    several, size = estimate.spread.ranks > 1, estimate.size
    table = Table()
    table.add_column("", no_wrap=True)
    for one in ones:
        table.add_column(_lines(one), justify="right", overflow="fold")
    for kind in KINDS:
        if any(one.of(kind) for one in estimate.optimizers):
            table.add_row(TITLES[kind], *(human(one.of(kind)) for one in ones))
    if ones[0].activations is not None:
        table.add_row("activations*", *(human(one.activations or 0) for one in ones))
    table.add_section()
    table.add_row("total", *(human(one.total()) for one in ones))
    if several:
        table.add_row("all ranks", *(human(one.all_ranks) for one in ones))
    table.add_row("bytes per parameter", *(f"{one.per_parameter:.3g}" for one in ones))
    if size is not None:
        table.add_section()
        table.add_row(f"fits {human(size)}", *("yes" if one.fits(size) else "no" for one in ones))
        table.add_row("largest model", *(count(one.largest_model(size)) for one in ones))
    return table


def _slots(estimate: MemoryEstimate, one: OptimizerEstimate) -> Table:
    several = estimate.spread.ranks > 1
    table = Table(title=f"State of {_title(one)}")
    for column in ("slot", "type"):
        table.add_column(column, overflow="fold")
    for column in ("values", "bytes", *(["all ranks"] if several else [])):
        table.add_column(column, justify="right")
    for entry, everywhere in one.slots():
        slot = f"{entry.slot} (a callback's)" if entry.kind == "stage" else entry.slot
        row = [slot, entry.dtype, f"{entry.elements:,}", human(entry.bytes)]
        table.add_row(*row, *([human(everywhere)] if several else []))
    return table


def sentences(estimate: MemoryEstimate) -> Iterator[str]:
    """What the tables do not say: shards that differ, what is an estimate, whether it fits, and the notes."""
    one = estimate.optimizers[0]
    low, high = one.total(one.smallest_rank), one.total()
    if low != high:
        yield (
            f"Ranks differ: with {one.name}, rank {one.smallest_rank} holds {human(low)} and rank {one.largest_rank} "
            f"{human(high)}."
        )
    if estimate.size is not None:
        fit = [_title(one) for one in estimate.optimizers if one.fits(estimate.size)]
        words = "all of these" if len(fit) == len(estimate.optimizers) > 1 else ", ".join(fit)
        yield f"It fits {human(estimate.size)} with {words}." if fit else f"It does not fit {human(estimate.size)}."
        yield "The largest model has the same bytes for each parameter, and the same activations."
    if any(one.of(kind) for one in estimate.optimizers for kind in ("communication", "exchange")):
        yield "* an estimate of what is held at once; parameters, gradients and state are exact."
    yield from estimate.notes


def _lines(one: OptimizerEstimate) -> str:
    """The head of a column: a class path and options in lines of their own."""
    word, *options = one.name.split(" ")
    path, _, last = word.rpartition(".")
    return "\n".join([*([f"{path}."] if path else []), last, *options, *([f"{one.bits} bits"] if one.bits else [])])


def _title(one: OptimizerEstimate) -> str:
    return one.name if one.bits is None else f"{one.name} at {one.bits} bits"


def count(number: int) -> str:
    """A number of parameters in a readable unit.

    Example:
        >>> count(856_982_649), count(12)
        ('857 M', '12')
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def picture(estimate: MemoryEstimate) -> Any:
    """A matplotlib figure: a bar for each optimizer and number of bits, of the parts of its memory on one rank."""
    ones = estimate.optimizers
    unit, scale = next(
        ((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if max(one.total() for one in ones) >= s), ("B", 1)
    )
    figure = new_figure(9, 1.8 + 0.35 * len(ones))
    axis = figure.subplots()
    parts = [(TITLES[kind].rstrip("*"), [one.of(kind) for one in ones]) for kind in KINDS]
    parts.append(("activations", [one.activations or 0 for one in ones]))
    left = [0.0] * len(ones)
    for (title, sizes), color in zip(parts, COLORS, strict=True):
        if any(sizes):
            axis.barh(range(len(ones)), [size / scale for size in sizes], left=left, label=title, color=color)
            left = [at + size / scale for at, size in zip(left, sizes, strict=True)]
    for i, at in enumerate(left):
        axis.text(at, i, f" {human(at * scale)}", va="center")
    far, size = max(left), estimate.size
    if size is not None and size / scale < 3 * far:  # else there is only the line to be seen
        axis.axvline(size / scale, color="black", linestyle="--", label=f"{human(size)} of a device")
        far = max(far, size / scale)
    axis.set_xlim(0, 1.2 * far)
    axis.set_yticks(range(len(ones)), [_title(one) for one in ones])
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit} on the rank with the most")
    axis.set_title(f"{estimate.module}, {count(estimate.parameters)} parameters, {estimate.spread.title}")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
