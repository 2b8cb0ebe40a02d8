"""Lengths of training in steps, epochs or fractions, and the timeline that turns them into steps."""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_optim.errors import OptionError, is_number
from lightning_optim.training.schedules import total_steps

ALLOWED = "a whole number of steps such as 100, a fraction of training below 1, or a text such as '5 epochs'"


@dataclass(frozen=True)
class Length:
    """A length of training, or a moment in it.

    Attributes:
        amount: How many of the unit.
        unit: "steps", "epochs" or "fraction" (of training).
    """

    amount: float
    unit: str = "steps"

    def __str__(self) -> str:
        if self.unit == "epochs":
            return f"{self.amount:g} epoch{'s' if self.amount != 1 else ''}"
        return f"{self.amount:g}"


def read_length(value: Any) -> Length | None:
    """Read a length: whole numbers are steps, numbers below 1 fractions of training; None for anything else.

    So 1.0 and 2.0, which may be steps, a fraction or percent, are None.

    Example:
        >>> print(read_length(100), read_length(0.05), read_length("1 epoch"), read_length("5 %"))
        100 0.05 1 epoch 0.05
    """
    if isinstance(value, Length):
        return value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(steps?|epochs?|%)\s*", value)
        if found is None or not math.isfinite(float(found[1])):
            return None
        amount, unit = float(found[1]), found[2].rstrip("s")
        if unit == "%":
            return Length(amount / 100, "fraction") if amount < 100 else None
        return Length(amount, unit + "s") if unit == "epoch" or amount.is_integer() else None
    with_point = not isinstance(value, numbers.Integral)
    if not is_number(value) or not 0 <= value < 2**63:
        return None
    number = float(value)
    if 0 < number < 1:
        return Length(number, "fraction")
    return Length(number) if number.is_integer() and not (with_point and 1 <= number < 100) else None


@dataclass(frozen=True)
class Timeline:
    """Turns lengths into steps.

    Attributes:
        total: The number of steps in the whole training.
        epochs: The number of steps in the first epochs, of which the last may be part of one.

    Example:
        >>> timeline = Timeline(lambda: 1000, lambda epochs: 100 * epochs)
        >>> timeline.steps(Length(0.05, "fraction")), timeline.steps(Length(2, "epochs")), timeline.steps(Length(7))
        (50.0, 200, 7)
    """

    total: Callable[[], float]
    epochs: Callable[[float], float]

    def steps(self, length: Length, after: int = 0) -> float:
        """The number of steps of a length. A fraction is of what is left after some steps."""
        if length.unit == "fraction":
            return length.amount * max(self.total() - after, 1)
        return self.epochs(length.amount) if length.unit == "epochs" else length.amount

    def whole(self, length: Length) -> int:
        """The same as a whole number, rounded up."""
        return up(self.steps(length))


def up(steps: float) -> int:
    """The next whole number of steps; one that differs by rounding alone stays."""
    return math.ceil(steps * (1 - 1e-12))


def timeline_of(owner: str, trainer: Any) -> Timeline:
    """The timeline of a fit.

    To know lengths the Trainer sets up the training loader. So nothing is read before somebody asks.

    Args:
        owner: Who asks, for messages.
        trainer: The Trainer.
    """

    def total() -> float:
        steps = math.inf if never_ends(trainer) else steps_of_fit(trainer.max_epochs, trainer.max_steps, loaded())
        if not math.isfinite(steps):
            raise OptionError(
                f"{owner} needs to know how long training is: the trainer has neither max_epochs nor "
                "max_steps, or an epoch has no length. Set max_steps."
            )
        return steps

    def epochs(count: float) -> float:
        return steps_of_epochs(count, loaded())

    def loaded() -> float:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        return float(trainer.num_training_batches)

    @functools.cache  # for each length of an epoch: a search for the batch size trains with others
    def steps_of_fit(epochs: int, steps: int, batches: float) -> float:
        return total_steps(trainer)

    @functools.cache
    def steps_of_epochs(count: float, batches: float) -> float:
        if not math.isfinite(batches):
            raise OptionError(
                f"{owner} counts in epochs, and an epoch of this training loader has no length. Write a number of "
                "steps, or set limit_train_batches."
            )
        changing = [c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")]

        def steps(epoch: int) -> int:
            accumulated: int = trainer.accumulate_grad_batches
            if changing:
                accumulated = changing[0].get_accumulate_grad_batches(epoch)
            return math.ceil(batches / accumulated)

        whole = int(count)
        before = sum(map(steps, range(whole))) if changing else whole * steps(0)
        return before + (count - whole) * steps(whole)

    return Timeline(total, epochs)


def never_ends(trainer: Any) -> bool:
    """Whether the Trainer has no end that is known before it has come."""
    return bool(trainer.max_epochs == -1 and trainer.max_steps == -1)
