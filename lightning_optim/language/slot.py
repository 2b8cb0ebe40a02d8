"""A slot: one named tensor of optimizer state for each parameter, or one number for the whole optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Per = Literal["element", "tensor", "optimizer"]


@dataclass(frozen=True)
class Slot:
    """The declaration of a slot on a page.

    A page does not declare when a slot exists. It exists if the update, traced under the given options, reads or writes
    it.

    Attributes:
        letter: The letter in the printed formula.
        signed: Whether values may be negative. 8-bit formats use their codes accordingly.
        exact: Whether the slot must not be rounded to few bits (a previous gradient, a running maximum). Such a slot is
            stored in full precision under any `state_bits`.
        per: Whether there is one value per element of the parameter, per tensor, or for the whole optimizer.
        init: The first value, or a function of the options that returns it.
        copies: Start as a copy of the parameter instead of `init`.
        root_of: The slot of squares, such as a second moment, relative to whose square root the values of this slot are
            bounded. Every update writes both. 8-bit formats use it as the partner.
        without: The name of a trait that holds an axis, along which the slot has size 1 (a row or column statistic).
        past: Whether the slot stores a value of an earlier step unchanged, and not a running mean.
        mean_square_by: The option that is the decay ("betas.1"), for a running mean of the squared gradient of each
            element that starts at zero.
        second_moment_by: The option that is the decay, for another second moment: of deviations from the mean, of the
            momentum, of the norm of the gradient, or a decaying maximum.
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
        """Whether it is a running mean of gradients or steps, which Lookahead may reset or pull back."""
        whole = self.per == "element" and self.without is None
        return whole and self.signed and not (self.exact or self.past or self.copies)

    def start(self, h: Any) -> float:
        """The first value under the options `h`."""
        return self.init(h) if callable(self.init) else self.init

    def shape(self, logical: torch.Size, traits: dict[str, Any]) -> torch.Size:
        """The shape of the slot of a parameter with this logical shape and these traits."""
        if self.per != "element":
            return torch.Size(())
        if self.without is None:
            return logical
        axis = traits[self.without] % len(logical)
        return torch.Size([1 if i == axis else size for i, size in enumerate(logical)])
