"""A slot: one named tensor of optimizer state for each parameter, or one number for the whole optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lightning_optim.language.axes import as_axes
from lightning_optim.language.view import View

Per = Literal["element", "tensor", "optimizer", "matrix"]
Side = Literal["rows", "columns"] | int  # of a matrix, or the index of an axis of its function (`View.axes`)


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
        per: Whether there is one value per element of the parameter, one per tensor, or for the whole optimizer, or a
            tensor of its own per matrix, which only functions of whole matrices read and write. Where the parameter is
            no matrix, such a slot has one value per element.
        shape: For a slot of a matrix, the sides that it has: ("rows", "rows") for a matrix from outputs to outputs.
        init: The first value, or a function of the options that returns it.
        copies: Start as a copy of the parameter instead of `init`.
        root_of: The slot of squares, such as a second moment, relative to whose square root the values of this slot are
            bounded. Every update writes both. 8-bit formats use it as the partner.
        without: The name of a trait that holds an axis, or a tuple of axes, along which the slot has size 1 (a row or
            column statistic).
        past: Whether the slot stores a value of an earlier step unchanged, and not a running mean.
        mean_square_by: The option that is the decay ("betas.1"), for a running mean of the squared gradient of each
            element that starts at zero.
        second_moment_by: The option that is the decay, for another second moment: of deviations from the mean, of the
            momentum, of the norm of the gradient, or a decaying maximum.
        mean_of: What its values are means of. A checkpoint of another page brings a slot of this name only where these
            words are the same.
        from_start: Whether it must have seen all steps that the counter counts, as a product of all steps must.
    """

    letter: str = ""
    signed: bool = True
    exact: bool = False
    per: Per = "element"
    shape: tuple[Side, ...] = ()
    init: float | Callable[[Any], float] = 0.0
    copies: bool = False
    root_of: str | None = None
    without: str | None = None
    past: bool = False
    mean_square_by: str | None = None
    second_moment_by: str | None = None
    mean_of: str = "gradient"
    from_start: bool = False

    @property
    def spans_all_steps(self) -> bool:
        """Whether steps would be too long if it began now, under a counter that goes on."""
        return self.from_start or bool(self.mean_square_by or self.second_moment_by)

    @property
    def is_first_moment(self) -> bool:
        """Whether it is a running mean of gradients or steps, which Lookahead may reset or pull back."""
        whole = self.per == "element" and self.without is None
        return whole and self.signed and not (self.exact or self.past or self.copies)

    def start(self, h: Any) -> float:
        """The first value under the options `h`."""
        return self.init(h) if callable(self.init) else self.init

    def of(self, view: View | None) -> Slot:
        """The slot of a parameter that is these matrices: one value per element where it is none."""
        return self if self.per != "matrix" or view is not None else replace(self, per="element", shape=())

    def shape_of(self, logical: torch.Size, traits: dict[str, Any], view: View | None = None) -> torch.Size:
        """The shape of the slot of a parameter with this logical shape, these traits and these matrices.

        Slots of several matrices of a tensor lie one behind the other: with a first axis that counts them, as one
        vector where their shapes differ, and in the shape of the tensor where they have rows and columns.
        """
        if self.per == "matrix" and view is not None:
            shapes = [torch.Size(view.side(side, i) for side in self.shape) for i in range(len(view.rows))]
            if self.shape == ("rows", "columns"):
                return logical
            if len({*shapes}) > 1:
                return torch.Size([sum(map(torch.Size.numel, shapes))])
            return shapes[0] if len(shapes) == 1 else torch.Size([len(shapes), *shapes[0]])
        if self.per not in ("element", "matrix"):
            return torch.Size(())
        if self.without is None:
            return logical
        without = {axis % len(logical) for axis in as_axes(traits[self.without])}
        return torch.Size([1 if i in without else size for i, size in enumerate(logical)])
