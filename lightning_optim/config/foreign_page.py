"""What the command says of an optimizer of torch or of another library."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from lightning_optim.config.foreign import REQUIRED, ForeignClass
from lightning_optim.config.layout import table, wrapped
from lightning_optim.config.recipes import Recipe
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.language.docstrings import arguments, sections
from lightning_optim.reports.memory import predicted_memory


def foreign_page(recipe: Recipe, given: Mapping[str, Any], width: int) -> str:
    """The description of a class: its signature, what it says of itself, its options, and its state.

    Args:
        recipe: The class, and its name.
        given: Options.
        width: Columns of the terminal.

    Raises:
        OptionError: for an option that it does not have, or a value that it refuses.
    """
    cls = recipe.optimizer_class
    kind = ForeignClass(cls)
    values, options = kind.read_options(given, f"optimizer {recipe.name!r}"), kind.options
    helps = {**_arguments(cls.__doc__ or ""), **arguments(cls.__doc__)}
    missing = [o.name for o in options.values() if o.default is REQUIRED and o.name not in values]
    written = [o.name if o.name in missing else f"{o.name}={values.get(o.name, o.default)!r}" for o in options.values()]
    rows = []
    for option in options.values():
        default = "required" if option.default is REQUIRED else repr(option.default)
        value = repr(values[option.name]) if option.name in values else ""
        rows.append([option.name, value, default, helps.get(option.name, "")])
    about = sections(cls.__doc__)[""].split("\n\n")[0] if "__doc__" in vars(cls) else ""
    defined = f"{cls.__module__}.{cls.__qualname__}"
    texts = [recipe.name if recipe.name == defined else f"{recipe.name} (defined as {defined})", about]
    facts = [
        f"State: it follows once {missing[0]} is given."
        if missing
        else _state(OptimizerStrategy(recipe.name, **values)),
        "It takes one parameter group only."
        if not missing and kind.takes_groups(values) is not None
        else "Groups, roles, schedules, callbacks and checkpoints work as for our own optimizers; state_bits, "
        "full_precision and engine do not.",
        *(
            ["Weight decay: none for biases and norms, as for all optimizers here; no_decay: [] lets all decay."]
            if "weight_decay" in options
            else []
        ),
    ]
    return "\n".join(
        [
            *(wrapped(text, width) for text in texts if text),
            "",
            wrapped(f"{cls.__name__}(params, {', '.join(written)})", width, "    "),
            "",
            table(["option", "given", "default", "what"], rows, width),
            "",
            *(wrapped(text, width) for text in facts),
        ]
    )


def _arguments(doc: str) -> dict[str, str]:
    """What a docstring in the way of torch says of arguments: `lr (float, optional): learning rate`."""
    entries = re.findall(r"^ *(\w+) \(.*?\): (.*(?:\n {10,}.*)*)", doc, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", what) for name, what in entries}


def _state(strategy: OptimizerStrategy) -> str:
    """The slots of a large matrix, and their bytes per parameter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.nn.Parameter(torch.empty(4096, 4096, dtype=torch.float32, device="meta"))
        entries = [entry for entry in predicted_memory(strategy.create([weight])) if entry.elements > 1]
        if not entries:
            kept = ForeignClass(strategy.optimizer_class).sample_state(strategy.options)
            known = kept is not None and not any(isinstance(x, torch.Tensor) and x.dim() for x in kept.values())
            return f"State: {'none' if known else 'it is not known before a run'}."
    size = sum(entry.bytes for entry in entries) / 4096**2
    return f"State: {', '.join(dict.fromkeys(entry.slot for entry in entries))}; bytes per parameter: {size:.3g}."
