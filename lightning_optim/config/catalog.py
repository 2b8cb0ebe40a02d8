"""The catalog of optimizers: a table, and a description of each, both read off the classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import yaml
from rich.console import Console
from rich.table import Table

from lightning_optim import storage
from lightning_optim.config.recipes import RECIPES, find
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.errors import OptionError
from lightning_optim.language.docstrings import arguments, sections
from lightning_optim.language.formula import formula
from lightning_optim.language.options import check_options, describe
from lightning_optim.reports.memory import predicted_memory


@dataclass(frozen=True)
class Line:
    """One optimizer in the table, under its default options or others, and for a large matrix.

    Attributes:
        name: The name in a config.
        title: The name of the class.
        paper: The source.
        slots: Names of the slots.
        bytes: Bytes of state per parameter, by `state_bits`.
        needs: What the update needs besides single elements.
    """

    name: str
    title: str
    paper: str
    slots: tuple[str, ...]
    bytes: dict[int, float]
    needs: tuple[str, ...]


def lines() -> list[Line]:
    """The lines of the table, sorted by name."""
    return [line(name) for name in sorted(OPTIMIZERS)]


def line(name: str, **options: Any) -> Line:
    """The line of one optimizer, under its default options and those that are given."""
    cls = OPTIMIZERS[name]
    optimizer = _sample(cls, **options)
    return Line(
        name=name,
        title=cls.__name__,
        paper=cls.paper,
        slots=optimizer.slots_of(0, optimizer.param_groups[0]["params"][0]),
        bytes={bits: _bytes_per_parameter(cls, **{**options, "state_bits": bits}) for bits in state_bits()},
        needs=optimizer.first_programs()[0].needs,
    )


def state_bits() -> tuple[int, ...]:
    """The values that `state_bits` may take."""
    return get_args(next(iter(OPTIMIZERS.values())).options["state_bits"].type)


def _sample(cls: type[Optimizer], **options: Any) -> Optimizer:
    """The optimizer of one large matrix without memory."""
    make: Any = cls
    optimizer: Optimizer = make(
        [torch.nn.Parameter(torch.empty(4096, 4096, dtype=torch.float32, device="meta"))], **options
    )
    return optimizer


def _bytes_per_parameter(cls: type[Optimizer], state_bits: int, **options: Any) -> float:
    """Bytes of state per parameter. Optimizers that cannot quantize a slot have those of 32 bits."""
    can_be_quantized = any(storage.can_be_quantized(slot) for slot in cls.slots.values())
    optimizer = _sample(cls, **{**options, "state_bits": state_bits if can_be_quantized else 32})
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
    """Print the table, or the description of each named optimizer with its formula.

    Args:
        args: Names, and options for the descriptions as `name=value` (`adamw amsgrad=true`).

    Returns:
        The exit status.
    """
    console = Console()
    names = [arg for arg in args if "=" not in arg]
    if not names:
        console.print(_table())
        return 0
    given = {key: yaml.safe_load(value) for key, _, value in (arg.partition("=") for arg in args if "=" in arg)}
    try:
        for name in names:
            _page(console, name, given)
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


def _page(console: Console, name: str, given: Mapping[str, Any]) -> None:
    recipe = find(name)
    cls = OPTIMIZERS[recipe.base]
    options = {**OptimizerStrategy(name).options, **check_options(given, cls.options, cls.__name__)}
    about, helps = sections(cls.__doc__), {**SHARED, **arguments(cls.__doc__)}
    console.rule(f"[bold]{name}[/bold]" if name == recipe.base else f"[bold]{name}[/bold] (on {recipe.base})")
    if recipe.about:
        console.print(recipe.about)
    console.print(about[""])
    console.print(f"[dim]{cls.paper}[/dim]\n")
    own = {key: value for key, value in options.items() if not cls.options[key].shared}
    console.print(formula(cls, **own), markup=False, highlight=False, soft_wrap=True)
    table = Table("option", "type", "default", "recommended", "what")
    for option in cls.options.values():
        start = cls.recommended.get(option.name, "")
        default: Any = options.get(option.name, option.default)
        table.add_row(option.name, describe(option.type), str(default), str(start), helps.get(option.name, ""))
    console.print(table)
    entry = line(recipe.base, **{key: value for key, value in options.items() if key not in ("engine", "capturable")})
    sizes = ", ".join(f"{size:.3g} at {bits} bits" for bits, size in entry.bytes.items())
    console.print(f"State: {', '.join(entry.slots) or 'none'}; bytes per parameter: {sizes}.")
    console.print(f"Needs: {', '.join(entry.needs) or 'nothing beyond one element'}.")
    console.print(f"Advice: {cls.advice}")
    if "Note" in about:
        console.print(about["Note"], markup=False)


def reference() -> str:
    """A page of Markdown with every optimizer: its formula, its options and advice."""
    parts = [REFERENCE]
    for name, cls in sorted(OPTIMIZERS.items()):
        about = sections(cls.__doc__)
        legend = "with " + " ".join(formula(cls).partition("\nwith ")[2].split())
        own = [option for option in cls.options.values() if not option.shared]
        helps = arguments(cls.__doc__)
        rows = [f"| `{o.name}` | `{o.default!r}` | {helps[o.name].replace('|', chr(92) + '|')} |" for o in own]
        parts += [
            f"## {cls.title}: `{name}`\n\n{about['']}\n\n{cls.paper}",
            "```math\n\\begin{aligned}\n" + formula(cls, "latex") + "\n\\end{aligned}\n```",
            legend + ".",
            "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]),
            *([" ".join(about["Note"].split())] if "Note" in about else []),
        ]
    return "\n\n".join(parts) + "\n"


SHARED = arguments(Optimizer.__doc__)
REFERENCE = """# Optimizers

Every optimizer with its formula, its options and advice for those who come from AdamW or SGD. The formulas are printed
from the updates that run, under the default options. `lightning-optim optimizers adamw amsgrad=true` prints one under
other options. In all of them θ is the parameter (w in KOALA-M), g or ∇f its gradient, and t the step, 1 at the first;
a norm with "all" is that of all parameters together."""
