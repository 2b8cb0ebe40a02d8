"""Names in a config: of optimizers, and of recipes, which are optimizers with options and companion callbacks."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.errors import OptionError, nearest, shown
from lightning_optim.language.options import plain


@dataclass(frozen=True)
class Recipe:
    """An optimizer with options and companion callbacks.

    Attributes:
        name: The name in a config.
        base: The name of the optimizer.
        options: Options that differ from the optimizer's defaults.
        callbacks: Names of the companion callbacks, classes of `lightning_optim.callbacks`.
        about: What it is, and the paper.
    """

    name: str
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[str, ...] = ()
    about: str = ""


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="gadam",
            base="adamw",
            callbacks=("IterateAveraging",),
            about="AdamW with iterate averaging. Granziol et al. 2020, arXiv:2003.01247.",
        ),
        Recipe(
            name="gadamx",
            base="padam",
            options={"partial": 0.125, "decoupled": True},
            callbacks=("IterateAveraging",),
            about="Padam with decoupled decay and iterate averaging. Granziol et al. 2020, arXiv:2003.01247.",
        ),
        Recipe(
            name="ranger",
            base="radam",
            callbacks=("LookaheadSync",),
            about="RAdam with Lookahead. Wright 2019; Zhang et al. 2019, arXiv:1907.08610.",
        ),
    )
}


def find(name: Any) -> Recipe:
    """The recipe of a name; for an optimizer, one without options and callbacks.

    Raises:
        OptionError: for an unknown name.
    """
    word = plain(name) if isinstance(name, str) else shown(name)
    if word in RECIPES:
        return RECIPES[word]
    if word in OPTIMIZERS:
        return Recipe(name=word, base=word)
    by_class = {cls.__name__: key for key, cls in OPTIMIZERS.items()}
    hint = f" Did you mean {by_class[word]}?" if word in by_class else nearest(word, list_optimizers())
    raise OptionError(f"There is no optimizer named {shown(name)}.{hint} There are {', '.join(list_optimizers())}.")


def list_optimizers(pattern: str | None = None) -> list[str]:
    """The names of optimizers and recipes for a config, sorted; with a pattern, those that match it.

    Example:
        >>> list_optimizers("adam*")
        ['adam', 'adamax', 'adamw']
    """
    names = sorted({*OPTIMIZERS, *RECIPES})
    return names if pattern is None else fnmatch.filter(names, pattern)
