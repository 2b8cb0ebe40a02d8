"""The catalog of optimizers: a table, and a description of each, both read off the classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, get_args

import torch

from lightning_optim import storage
from lightning_optim.config.class_paths import path_of
from lightning_optim.config.command_line import read_value
from lightning_optim.config.foreign_page import foreign_page
from lightning_optim.config.layout import table, terminal_width, wrapped
from lightning_optim.config.recipes import RECIPES, REGISTERED, find
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.core.routing import by_role
from lightning_optim.core.state_layout import WHOLE
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
    return _line(name, OPTIMIZERS[name], **options)


def _line(name: str, cls: type[Optimizer], **options: Any) -> Line:
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
    with by_role():
        optimizer: Optimizer = make(
            [torch.nn.Parameter(torch.empty(4096, 4096, dtype=torch.float32, device="meta"))], **options
        )
    return optimizer


def _bytes_per_parameter(cls: type[Optimizer], state_bits: int, **options: Any) -> float:
    """Bytes of state per parameter. Optimizers that cannot quantize a slot have those of 32 bits."""
    can_be_quantized = any(storage.can_be_quantized(slot) for slot in cls.slots.values())
    optimizer = _sample(cls, **{**options, "state_bits": state_bits if can_be_quantized else 32})
    elements = [
        e for e in predicted_memory(optimizer) if e.slot != "step" and cls.slots[e.slot].per in ("element", "matrix")
    ]
    return sum(entry.bytes for entry in elements) / 4096**2


USAGE = """usage: lightning-optim optimizers [NAME ...] [OPTION=VALUE ...]

Without a name: a table of all optimizers, with the state that they keep, its
bytes per parameter, and what an update needs beyond one element. With names:
formula, options and advice of each, under the options that are given.

  lightning-optim optimizers
  lightning-optim optimizers adan
  lightning-optim optimizers adamw amsgrad=true state_bits=8
  lightning-optim optimizers torch.optim.SGD
"""


def show(args: Sequence[str]) -> int:
    """Print the table, or the description of each named optimizer with its formula.

    Args:
        args: Names, and options for the descriptions as `name=value` (`adamw amsgrad=true`).

    Returns:
        The exit status.
    """
    if any(arg in ("-h", "--help") for arg in args):
        print(USAGE, end="")
        return 0
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a formula has Greek letters, whatever the locale
    names = [arg for arg in args if "=" not in arg]
    given = {key: read_value(value) for key, _, value in (arg.partition("=") for arg in args if "=" in arg)}
    width = terminal_width()
    try:
        if wrong := [arg for arg in args if arg.startswith("-")]:
            raise OptionError(f"{wrong[0]!r} is no option of `optimizers`; --help says more.")
        if given and not names:
            raise OptionError(f"{args[0]!r} is an option of no optimizer; name one, such as: adamw {args[0]}.")
        print("\n\n".join(_page(name, given, width) for name in names) if names else _table(width))
    except OptionError as error:
        print(f"lightning-optim: {error}", file=sys.stderr)
        return 2
    return 0


def _table(width: int) -> str:
    bits = state_bits()
    rows = []
    for entry in lines():
        sizes = ", ".join(f"{entry.bytes[b]:.3g}" for b in bits)
        rows.append([entry.name, entry.paper, ", ".join(entry.slots), sizes, ", ".join(entry.needs)])
    head = ["config", "paper", "state", f"bytes at {', '.join(map(str, bits))} bits", "needs"]
    recipes = [[recipe.name, f"on {recipe.base}", recipe.about] for recipe in RECIPES.values()]
    registered = [[word, path_of(cls), sections(cls.__doc__)[""]] for word, cls in REGISTERED.items()]
    return "\n".join(
        [
            wrapped("Optimizers: bytes of state per parameter, and what an update needs beyond one element", width),
            table(head, rows, width),
            "",
            table(["recipe", "base", "about"], recipes, width),
            *(["", table(["registered", "class", "about"], registered, width)] if registered else []),
        ]
    )


def _page(name: str, given: Mapping[str, Any], width: int) -> str:
    recipe = find(name)
    cls: Any = recipe.optimizer_class
    if not issubclass(cls, Optimizer):
        return foreign_page(recipe, given, width)
    options = OptimizerStrategy(name, **check_options(given, cls.options, cls.__name__)).options
    about, helps = sections(cls.__doc__), {**SHARED, **arguments(cls.__doc__)}
    own = {key: value for key, value in options.items() if not cls.options[key].shared}
    rows = []
    for option in cls.options.values():
        default, start = options.get(option.name, option.default), cls.recommended.get(option.name, "")
        rows.append([option.name, describe(option.type), str(default), str(start), helps.get(option.name, "")])
    entry = _line(recipe.base, cls, **{key: value for key, value in options.items() if key not in WHOLE})
    sizes = ", ".join(f"{size:.3g} at {bits} bits" for bits, size in entry.bytes.items())
    texts = [
        name if name == recipe.base else f"{name} (on {recipe.base})",
        recipe.about,
        *about[""].split("\n\n"),
        cls.paper,
    ]
    facts = [
        ON_DIGITS if cls.recommended else "",
        f"State: {', '.join(entry.slots) or 'none'}; bytes per parameter: {sizes}.",
        f"Needs: {', '.join(entry.needs) or 'nothing beyond one element'}.",
        f"Advice: {cls.advice}",
        *about.get("Note", "").split("\n\n"),
    ]
    return "\n".join(
        [
            *(wrapped(text, width) for text in texts if text),
            f"\n{formula(cls, **own)}\n",
            table(["option", "type", "default", "on digits", "what"], rows, width),
            "",
            *(wrapped(text, width) for text in facts if text),
        ]
    )


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
ON_DIGITS = (
    "On digits: what did best in a few runs of examples/digits (docs/digits_race.md), a small network on 1300 images "
    "of 8 x 8 pixels, for which learning rates are large. On other data begin with the default, and tune it."
)
REFERENCE = """# Optimizers

Every optimizer with its formula, its options and advice for those who come from AdamW or SGD. The formulas are printed
from the updates that run, under the default options. `lightning-optim optimizers adamw amsgrad=true` prints one under
other options. In all of them θ is the parameter (w in KOALA-M), g or ∇f its gradient, and t the step, 1 at the first;
a norm with "all" is that of all parameters together."""
