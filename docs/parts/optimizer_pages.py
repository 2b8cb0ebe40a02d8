"""One page for each optimizer and recipe, and the page that lists them: all of it is read off classes and results."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from docs.parts import curves, facts
from docs.parts.markdown import WRITTEN, linked, table, yaml_value
from lightning_optim.config.catalog import lines, state_bits
from lightning_optim.config.recipes import RECIPES, Recipe
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.language.docstrings import arguments, sections
from lightning_optim.language.formula import formula
from lightning_optim.language.options import describe

MORE = {  # pages written by hand that say more than the class does
    "muon": "[muon.md](../muon.md): which tensors follow which rule, fused projections, files of torch.optim.Muon",
    "soap": "[soap.md](../soap.md): which tensors, state, shards, reproducibility",
    "prodigy": "[from_adamw.md](../from_adamw.md): the step size of Prodigy, and how to watch it",
    **dict.fromkeys(
        ("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"),
        "[schedule_free.md](../schedule_free.md): what is evaluated, in a Trainer and in a loop",
    ),
}


def page(name: str) -> str:
    """The page of one optimizer."""
    cls = OPTIMIZERS[name]
    about = sections(cls.__doc__)
    return join(
        f"# {cls.title}",
        WRITTEN,
        about[""],
        f"Source: {linked(cls.paper)}. Class `lightning_optim.{cls.__name__}`, in a config `{name}`.",
        yaml_of(name, {"lr": cls.options["lr"].default} if "lr" in cls.options else {}),
        example(cls, about),
        "## Formula",
        "Printed from the update that runs, under the default options. θ is the parameter, g or ∇f its gradient, t the "
        'step, 1 at the first; a norm with "all" is that of all parameters together. '
        f"`lightning-optim optimizers {name} OPTION=VALUE` prints it under other options.",
        "```math\n\\begin{aligned}\n" + formula(cls, "latex") + "\n\\end{aligned}\n```",
        "With " + " ".join(formula(cls).partition("\nwith ")[2].split()) + ".",
        "## When, and with which settings",
        *(" ".join(text.split()) for text in about.get("Note", cls.advice).split("\n\n")),
        f"More: {MORE[name]}." if name in MORE else "",
        "## Options",
        options(cls),
        "[Options that all optimizers have](../optimizers.md#options-of-all-optimizers): `state_bits`, `cautious`, "
        "`engine` and others. Keys of a config beside them: [Config](../../README.md#config).",
        "## State",
        "Bytes per parameter by `state_bits`, for a large matrix under default options "
        "([8 bits in practice](../eight_bits.md)).",
        facts.state(cls),
        "## Cost",
        needs(name),
        facts.cost(name),
        "## Strategies",
        facts.served(cls),
        "## How it does",
        curves.section(name, curves.results()),
        digits(name),
        f"The page of mathematics that runs: [{Path(inspect.getfile(cls)).name}](../../{relative(cls)}).",
    )


def recipe_page(recipe: Recipe) -> str:
    """The page of a recipe: what it stands for, spelled out."""
    base = OPTIMIZERS[recipe.base]
    spelled = {key: value for key, value in recipe.options.items()}
    callbacks = "\n".join(f"    - class_path: lightning_optim.callbacks.{name}" for name in recipe.callbacks)
    spec = {"name": recipe.base, **spelled} if spelled else recipe.base
    return join(
        f"# {recipe.name}",
        WRITTEN,
        linked(recipe.about),
        yaml_of(recipe.name, {"lr": base.options["lr"].default}),
        "It is a word for",
        fenced(
            "yaml",
            f"model:\n  optimizer: {yaml_value(spec)}\ntrainer:\n  callbacks:\n{callbacks}",
        ),
        "A callback of this kind that the Trainer already has takes the place of the one that the recipe brings along.",
        f"Formula, options, state and cost are those of [{base.title}]({recipe.base}.md), and what "
        + " and ".join(f"[{name}](../{snake(name)}.md)" for name in recipe.callbacks)
        + " adds to the state.",
        "## How it does",
        curves.section(recipe.name, curves.results()),
        digits(recipe.name),
    )


def index() -> str:
    """The page that lists all optimizers by what they need."""
    bits = state_bits()
    rows = [
        [
            f"[`{entry.name}`](optimizers/{entry.name}.md)",
            sections(OPTIMIZERS[entry.name].__doc__)[""].split("\n\n")[0].replace("\n", " "),
            linked(entry.paper),
            *(f"{entry.bytes[b]:.3g}" for b in bits),
        ]
        for entry in lines()
    ]
    recipes = [[f"[`{r.name}`](optimizers/{r.name}.md)", linked(r.about)] for r in RECIPES.values()]
    return join(
        "# Optimizers",
        WRITTEN + "\n<!-- contents -->",
        "Every optimizer on a page of its own: formula, options, advice for those who come from AdamW or SGD, state, "
        "cost, strategies and curves. [Which one to use](which_optimizer.md) has a page, too. "
        "`lightning-optim optimizers` prints this table in a terminal, `lightning-optim optimizers adan` one page.",
        "Bytes are optimizer state per parameter by `state_bits`, for a large matrix with default options.",
        table(["word", "what it does", "source", *(f"bytes at {b} bits" for b in bits)], rows),
        "A recipe is an optimizer with options and callbacks:",
        table(["word", "is"], recipes),
        "## Options of all optimizers",
        shared_options(),
    )


def example(cls: type[Optimizer], about: dict[str, str]) -> str:
    """The example of the docstring, which doctest runs, with the import that its module need not say."""
    text = about.get("Example", "")
    line = f">>> from lightning_optim import {cls.__name__}"
    return fenced("python", text if line in text else f"{line}\n{text}") if text else ""


def options(cls: type[Optimizer]) -> str:
    """The table of a page's own options. The digits have a column where settings for them are recorded."""
    helps = arguments(cls.__doc__)
    own = [option for option in cls.options.values() if not option.shared]
    tuned = [option.name for option in own if option.name in cls.recommended]
    rows = []
    for option in own:
        at = [f"`{yaml_value(cls.recommended[option.name])}`" if option.name in tuned else ""] if tuned else []
        rows.append([f"`{option.name}`", kind(option.type), f"`{yaml_value(option.default)}`", *at, helps[option.name]])
    on_digits = (
        '\n\n"On digits" is what did best in a few runs on the handwritten digits, a small network on little data, for '
        "which learning rates are large. On other data begin with the default, and tune it."
        if tuned
        else ""
    )
    return table(["option", "type", "default", *(["on digits"] if tuned else []), "meaning"], rows) + on_digits


def kind(hint: Any) -> str:
    """The type of an option, with its words as code."""
    return describe(hint).replace("'", "`")


def shared_options() -> str:
    helps = arguments(Optimizer.__doc__)
    seen = {o.name: o for cls in OPTIMIZERS.values() for o in cls.options.values() if o.shared}
    rows = [[f"`{o.name}`", kind(o.type), f"`{yaml_value(o.default)}`", helps[o.name]] for o in seen.values()]
    return table(["option", "type", "default", "meaning"], rows)


def needs(name: str) -> str:
    found = next(entry.needs for entry in lines() if entry.name == name)
    if not found:
        return "An update needs nothing beyond one element: one pass over the tensors."
    return f"An update needs, beyond one element: {', '.join(found)}."


def digits(name: str) -> str:
    """What one run on the digits ended in."""
    found = json.loads((facts.RESULTS / "digits_race.json").read_text())
    run = next((run for run in found["runs"] if run["name"] == name), None)
    if run is None:
        return ""
    setting = ", ".join(f"`{key}: {yaml_value(value)}`" for key, value in run["options"].items()) or "defaults"
    best = max(found["runs"], key=lambda one: one["test/accuracy"])
    return (
        f"On the digits ({found['about']['epochs']} epochs, one seed, {setting}) it ended at a validation loss of "
        f"{run['val/loss']:.3g} and a test accuracy of {100 * run['test/accuracy']:.1f} %; the best of all, "
        f"`{best['name']}`, at {100 * best['test/accuracy']:.1f} %. With one seed a percent means nothing "
        "([all of them](../digits_race.md))."
    )


def yaml_of(name: str, more: dict[str, Any]) -> str:
    return fenced("yaml", f"model:\n  optimizer: {yaml_value({'name': name, **more})}")


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def relative(cls: type) -> str:
    return Path(inspect.getfile(cls)).relative_to(Path(__file__).parents[2]).as_posix()


def snake(name: str) -> str:
    """The name of a callback's page: `LookaheadSync` has lookahead_sync.md."""
    if name == "StationarityMonitor":
        return "stationarity"
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
