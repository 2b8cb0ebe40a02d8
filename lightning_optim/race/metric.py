"""Which number decides, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from lightning_optim.errors import OptionError, check_choice, nearest, shown

TRAINING_LOSS = "training loss"
HIGHER = ("acc", "accuracy", "auc", "auroc", "bleu", "dice", "f1", "iou", "map", "precision", "psnr", "r2", "recall")


@dataclass(frozen=True)
class Metric:
    """What candidates are compared by.

    Attributes:
        name: As it was logged.
        mode: "min" where lower is better, else "max".
    """

    name: str
    mode: Literal["min", "max"] = "min"

    @property
    def sign(self) -> int:
        """1 where lower is better, else -1."""
        return 1 if self.mode == "min" else -1

    @property
    def direction(self) -> str:
        """In words."""
        return "lower is better" if self.mode == "min" else "higher is better"


def choose(asked: str | None, mode: str | None, names: Collection[str], validated: Collection[str] = ()) -> Metric:
    """The metric that is asked for; else the validation loss if there is one, else the training loss.

    Args:
        asked: Its name.
        mode: "min" or "max"; by default "max" for a name that says accuracy or the like.
        names: What a run has found.
        validated: Those of them that are of the validation.

    Raises:
        OptionError: for a name or mode that there is not, or where none is a loss.

    Example:
        >>> choose(None, None, ["training loss", "val/loss", "val/accuracy"], ["val/loss", "val/accuracy"])
        Metric(name='val/loss', mode='min')
        >>> choose("val/accuracy", None, ["val/accuracy"])
        Metric(name='val/accuracy', mode='max')
    """
    if mode is not None:
        check_choice("compare", "mode", mode, ("min", "max"))
    name = asked if asked is not None else _loss(validated) or (TRAINING_LOSS if TRAINING_LOSS in names else None)
    if name is None:
        name = _loss(names) or (next(iter(names)) if len(names) == 1 else None)
    there_are = f"There are {', '.join(sorted(names))}" if names else "Nothing was logged"
    if name is None:
        raise OptionError(f"there is no loss to compare by. {there_are}; say which with --metric, and --mode.")
    if name not in names:
        raise OptionError(f"there is no metric {shown(name)}.{nearest(name, names)} {there_are}.")
    higher = any(word in HIGHER for word in _words(name))
    if mode == "max" or (mode is None and higher):
        return Metric(name, "max")
    return Metric(name)


def _loss(names: Collection[str]) -> str | None:
    """The shortest name that ends in the word loss, or contains it."""
    ends = [name for name in names if _words(name)[-1:] == ["loss"]]
    return min(ends or [name for name in names if "loss" in name.lower()], key=len, default=None)


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name)]
