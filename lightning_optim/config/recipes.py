"""Names that mean an optimizer with settings and companion callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback


@dataclass(frozen=True)
class Recipe:
    """An optimizer by name, with options and callbacks that belong to it.

    Attributes:
        name: The word in a config.
        base: The optimizer.
        options: Options in which it differs from the optimizer's defaults.
        callbacks: What makes each companion callback.
        about: One sentence: what it is, and the paper.
    """

    name: str
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callable[[], Callback], ...] = ()
    about: str = ""


def _averaging() -> Callback:
    from lightning_optim.callbacks import IterateAveraging

    return IterateAveraging()


def _lookahead() -> Callback:
    from lightning_optim.callbacks import LookaheadSync

    return LookaheadSync()


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="gadam",
            base="adamw",
            callbacks=(_averaging,),
            about="AdamW with iterate averaging. Granziol et al. 2020, arXiv:2003.01247.",
        ),
        Recipe(
            name="gadamx",
            base="padam",
            options={"partial": 0.125, "decoupled": True},
            callbacks=(_averaging,),
            about="Padam with decoupled decay and iterate averaging. Granziol et al. 2020, arXiv:2003.01247.",
        ),
        Recipe(
            name="ranger",
            base="radam",
            callbacks=(_lookahead,),
            about="RAdam with Lookahead. Wright 2019; Zhang et al. 2019, arXiv:1907.08610.",
        ),
    )
}
