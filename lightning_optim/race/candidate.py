"""Who takes part in a race."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_optim.errors import OptionError, is_number, shown


@dataclass(frozen=True)
class Candidate:
    """One of those that are compared.

    Attributes:
        name: What a table calls it.
        lr: The learning rate around which its grid lies.
        spec: What `run` needs to know, in plain values. A stored run is of this candidate if name and spec are equal.
        note: What a reader should know of it.
    """

    name: str
    lr: float
    spec: Any = None
    note: str = ""


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Refuse a race of nobody, of one candidate twice, and learning rates that are no positive numbers.

    Raises:
        OptionError: for any of these.
    """
    if not candidates:
        raise OptionError("there is no candidate to compare. Name some, such as adamw adan.")
    names = [candidate.name for candidate in candidates]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"candidate {twice!r} is there twice. Give each once, or with other options.")
    for candidate in candidates:
        if not is_number(candidate.lr) or not 0 < candidate.lr < float("inf"):
            raise OptionError(f"candidate {candidate.name!r}: lr={shown(candidate.lr)} must be a number above 0.")
