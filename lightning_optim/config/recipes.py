"""Names in a config: of optimizers, of recipes, which are optimizers with options and callbacks, and of classes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_optim.config.class_paths import can_be_imported, check_class, is_class_path, load, path_of
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
        cls: The class, where `base` is the path of a class.
    """

    name: str
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[str, ...] = ()
    about: str = ""
    cls: type[torch.optim.Optimizer] | None = None

    @property
    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The class of the optimizer."""
        return self.cls or REGISTERED.get(self.base) or OPTIMIZERS[self.base]


REGISTERED: dict[str, type[torch.optim.Optimizer]] = {}
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
    """The recipe of a name or a class; for an optimizer, one without options and callbacks.

    Args:
        name: A word of `list_optimizers()`, the path of a class of optimizers, or such a class.

    Raises:
        OptionError: for an unknown name, and for a class that is no optimizer.

    Example:
        >>> find("ranger").base, find("torch.optim.SGD").optimizer_class
        ('radam', <class 'torch.optim.sgd.SGD'>)
    """
    if isinstance(name, type):
        return _of_class(check_class(name, path_of(name)))
    word = plain(name) if isinstance(name, str) else shown(name)
    if word in RECIPES:
        return RECIPES[word]
    if word in OPTIMIZERS or word in REGISTERED:
        return Recipe(name=word, base=word)
    if isinstance(name, str) and is_class_path(word):
        return _of_class(load(word), word)
    raise OptionError(
        f"There is no optimizer named {shown(name)}.{_hint(word)} There are {', '.join(list_optimizers())}, and class "
        "paths such as torch.optim.SGD."
    )


def _of_class(cls: type[torch.optim.Optimizer], path: str = "") -> Recipe:
    """The recipe of a class: by its word where that is ours, or where no other process could import the class."""
    path = path or path_of(cls)
    word = next((word for word, other in {**OPTIMIZERS, **REGISTERED}.items() if other is cls), None)
    if word and (cls.__module__.startswith("lightning_optim.") or not can_be_imported(cls)):
        return Recipe(name=word, base=word)
    return Recipe(name=path, base=path, cls=cls)


def _hint(word: str) -> str:
    found = [key for key, cls in OPTIMIZERS.items() if cls.__name__ == word]
    of_torch = [name for name, value in vars(torch.optim).items() if isinstance(value, type) and name != "Optimizer"]
    found += [f"torch.optim.{name}" for name in of_torch if name.lower() == word.lower()]
    return f" Did you mean {' or '.join(found)}?" if found else nearest(word, list_optimizers())


def register_optimizer(word: str, cls: type[torch.optim.Optimizer]) -> None:
    """Let a word mean an optimizer, in every place that takes one by a word.

    A page, which is a subclass of `lightning_optim.Optimizer`, has a word by being defined:
    `class MyPage(Optimizer, name="my_page")`. Call this in the module of the class, so that whoever imports the class
    can use the word.

    Args:
        word: A name without dots.
        cls: A subclass of `torch.optim.Optimizer`.

    Raises:
        OptionError: for a word that is taken, or is none, and for a class that is no optimizer.

    Example:
        >>> register_optimizer("adan", torch.optim.SGD)
        Traceback (most recent call last):
        ...
        lightning_optim.errors.OptionError: register_optimizer: the word 'adan' is taken: it means ...
    """
    if not isinstance(word, str) or not word.isidentifier():
        raise OptionError(f"register_optimizer: {shown(word)} must be a word of letters, digits and underscores.")
    check_class(cls, path_of(cls) if isinstance(cls, type) else shown(cls))
    before = REGISTERED.get(word) or OPTIMIZERS.get(word)
    same = before is not None and (before.__module__, before.__qualname__) == (cls.__module__, cls.__qualname__)
    if word in RECIPES or (before is not None and not same):
        owner = f"means {path_of(before)}" if before is not None else "is a recipe"
        raise OptionError(f"register_optimizer: the word {word!r} is taken: it {owner}. Choose another.")
    REGISTERED[word] = cls


def list_optimizers(pattern: str | None = None) -> list[str]:
    """The names of optimizers and recipes for a config, sorted; with a pattern, those that match it.

    Example:
        >>> list_optimizers("adam*")
        ['adam', 'adamax', 'adamw']
    """
    names = sorted({*OPTIMIZERS, *RECIPES, *REGISTERED})
    return names if pattern is None else fnmatch.filter(names, pattern)
