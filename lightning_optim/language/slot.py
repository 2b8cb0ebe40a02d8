"""A slot: one piece of state that an update keeps for each parameter, or for the whole optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Per = Literal["element", "tensor", "optimizer"]


@dataclass(frozen=True)
class Slot:
    """What a page says about a piece of its state.

    The page never says when a slot exists: it exists when the update, read under the given options, touches it.

    Attributes:
        letter: Its letter in the printed formula.
        signed: Whether values may be negative. Codes of few bits use their range accordingly.
        exact: Whether rounding to few bits would change the method (a previous gradient, a running maximum): such a
            slot stays in full precision whatever `state_bits` says.
        per: One value per element of the parameter, one per tensor, or one for the optimizer.
        init: The first value, or a function of the options that gives it.
        copies: Start as a copy of the parameter, as it is when the slot is made, instead of `init`.
        root_of: The slot that holds squares in whose root this one's values are naturally measured, as a mean gradient
            in the root of the mean square. Every update writes both. Codes of few bits make use of it.
        without: The name of a trait that holds an axis: the slot has size 1 along it (a row or column statistic).
        past: Holds a value of an earlier step as it was, and no running mean.
        mean_square_by: For a running mean of the squared gradient of each element that starts at zero: the option that
            is its decay, as "betas.1".
        second_moment_by: The same for a second moment of another kind: of deviations from the mean, of the momentum, of
            the gradient's norm, or a decaying maximum.
    """

    letter: str = ""
    signed: bool = True
    exact: bool = False
    per: Per = "element"
    init: float | Callable[[Any], float] = 0.0
    copies: bool = False
    root_of: str | None = None
    without: str | None = None
    past: bool = False
    mean_square_by: str | None = None
    second_moment_by: str | None = None

    @property
    def is_first_moment(self) -> bool:
        """Whether it is a running mean of gradients or steps, which one may pull back or forget."""
        whole = self.per == "element" and self.without is None
        return whole and self.signed and not (self.exact or self.past or self.copies)

    def start(self, h: Any) -> float:
        """The first value under the options `h`."""
        return self.init(h) if callable(self.init) else self.init

    def shape(self, logical: torch.Size, traits: dict[str, Any]) -> torch.Size:
        """The shape of the slot of a tensor of the given logical shape."""
        if self.per != "element":
            return torch.Size(())
        if self.without is None:
            return logical
        axis = traits[self.without] % len(logical)
        return torch.Size([1 if i == axis else size for i, size in enumerate(logical)])
