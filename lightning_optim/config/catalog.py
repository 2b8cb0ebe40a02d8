"""What there is to choose from: the table of optimizers, and a page for each, both read off the classes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from lightning_optim import storage
from lightning_optim.config.recipes import RECIPES
from lightning_optim.config.strategy import OptimizerStrategy, find
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.errors import OptionError
from lightning_optim.language.options import describe
from lightning_optim.reports.memory import predicted_memory


@dataclass(frozen=True)
class Line:
    """One optimizer in the table, under its default options and for a large matrix.

    Attributes:
        name: The word in a config.
        title: The class.
        paper: Where it comes from.
        slots: State per parameter.
        bytes: Bytes of state per parameter, by `state_bits`.
        needs: What it needs beyond one element.
    """

    name: str
    title: str
    paper: str
    slots: tuple[str, ...]
    bytes: dict[int, float]
    needs: tuple[str, ...]


def lines() -> list[Line]:
    """The table's lines, by name."""
    return [line(name) for name in sorted(OPTIMIZERS)]


def line(name: str) -> Line:
    """What the table says of one optimizer."""
    cls = OPTIMIZERS[name]
    optimizer = _sample(cls)
    return Line(
        name=name,
        title=cls.__name__,
        paper=cls.paper,
        slots=optimizer.slots_of(0, optimizer.param_groups[0]["params"][0]),
        bytes={bits: _bytes_per_parameter(cls, bits) for bits in state_bits()},
        needs=optimizer.first_programs()[0].needs,
    )


def state_bits() -> tuple[int, ...]:
    """The values that `state_bits` may take."""
    return get_args(next(iter(OPTIMIZERS.values())).options["state_bits"].type)


def _sample(cls: type[Optimizer], **options: Any) -> Optimizer:
    """The optimizer of one large matrix without memory."""
    make: Any = cls
    optimizer: Optimizer = make([torch.nn.Parameter(torch.empty(4096, 4096, device="meta"))], **options)
    return optimizer


def _bytes_per_parameter(cls: type[Optimizer], bits: int) -> float:
    """Bytes of state for each parameter; where fewer bits have nothing to keep, those of 32."""
    codable = any(storage.can_be_quantized(slot) for slot in cls.slots.values())
    optimizer = _sample(cls, state_bits=bits if codable else 32)
    elements = [e for e in predicted_memory(optimizer) if e.slot != "step" and cls.slots[e.slot].per == "element"]
    return sum(entry.bytes for entry in elements) / 4096**2


def markdown() -> str:
    """The table as Markdown, for README and docs."""
    bits = state_bits()
    head = ["config", "class", "paper", "state", *(f"bytes at {b} bits" for b in bits), "needs"]
    rows = [head, ["---"] * len(head)]
    for entry in lines():
        sizes = [f"{entry.bytes[b]:.3g}" for b in bits]
        needs = ", ".join(entry.needs) or "–"
        state = ", ".join(f"`{slot}`" for slot in entry.slots) or "–"
        rows.append([f"`{entry.name}`", f"`{entry.title}`", entry.paper, state, *sizes, needs])
    recipes = ["| recipe | is |", "| --- | --- |", *(f"| `{r.name}` | {r.about} |" for r in RECIPES.values())]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", *recipes]) + "\n"


def show(args: Sequence[str]) -> int:
    """Print the table, or the page of each optimizer that is named; the exit status."""
    console = Console()
    if not args:
        console.print(_table())
        return 0
    try:
        for name in args:
            _page(console, name)
    except OptionError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _table() -> Table:
    bits = state_bits()
    table = Table(title="Optimizers: bytes of state per parameter, and what an update needs beyond one element")
    for column in ("config", "paper", "state", *(f"{b} bits" for b in bits), "needs"):
        table.add_column(column)
    for entry in lines():
        sizes = [f"{entry.bytes[b]:.3g}" for b in bits]
        table.add_row(entry.name, entry.paper, ", ".join(entry.slots), *sizes, ", ".join(entry.needs))
    table.add_section()
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.about, f"as {recipe.base}")
    return table


def _page(console: Console, name: str) -> None:
    recipe = find(name)
    cls = OPTIMIZERS[recipe.base]
    doc = inspect.getdoc(cls) or ""
    before, _, rest = doc.partition("Args:\n")
    helps, notes = _arguments(rest)
    console.rule(f"[bold]{name}[/bold]" if name == recipe.base else f"[bold]{name}[/bold] (on {recipe.base})")
    if recipe.about:
        console.print(recipe.about)
    console.print(before.strip())
    console.print(f"[dim]{cls.paper}[/dim]")
    table = Table("option", "type", "default", "recommended", "what")
    options = OptimizerStrategy(name).options
    for option in cls.options.values():
        start = cls.recommended.get(option.name, "")
        default: Any = options.get(option.name, option.default)
        help_text = helps.get(option.name) or SHARED.get(option.name, "")
        table.add_row(option.name, describe(option.type), str(default), str(start), help_text)
    console.print(table)
    entry = line(recipe.base)
    sizes = ", ".join(f"{size:.3g} at {bits} bits" for bits, size in entry.bytes.items())
    console.print(f"State: {', '.join(entry.slots) or 'none'}; bytes per parameter: {sizes}.")
    console.print(f"Needs: {', '.join(entry.needs) or 'nothing beyond one element'}.")
    console.print(f"Advice: {cls.advice}")
    if notes:
        console.print(notes)


def _arguments(text: str) -> tuple[dict[str, str], str]:
    """What a docstring says of each argument, and the note that follows."""
    helps: dict[str, str] = {}
    sections = re.split(r"\n(?=[A-Z][a-z]+:\n)", text)  # what follows the arguments: Note, Raises, Example
    note = next((section.partition("\n")[2] for section in sections if section.startswith("Note:")), "")
    current = ""
    for raw in sections[0].splitlines():
        name, colon, what = raw.strip().partition(": ")
        if raw.startswith("    ") and not raw.startswith("     ") and colon:
            current = name
            helps[current] = what
        elif current and raw.strip():
            helps[current] += " " + raw.strip()
    return helps, inspect.cleandoc(note)


SHARED = _arguments((inspect.getdoc(Optimizer) or "").partition("Args:\n")[2])[0]
