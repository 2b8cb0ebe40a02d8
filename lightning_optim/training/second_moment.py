"""Finds the second moment of an optimizer, and the option that is its decay.

Our pages declare it at the slot (`mean_square_by`, `second_moment_by`). A table lists optimizers of torch and of other
libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from lightning_optim.core.optimizer import Optimizer


class SecondMoment(NamedTuple):
    """A second moment in the state of an optimizer.

    Attributes:
        slot: The key in the state where it is the mean of the squared gradient of each element; empty otherwise.
        option: The option that is its decay, a key of the parameter group.
        item: The position of the decay where that option is a tuple, as a string; empty where it is a number.
    """

    slot: str
    option: str
    item: str = ""

    def decay(self, group: Mapping[str, Any]) -> float:
        """The value of the decay in a parameter group."""
        value = group[self.option]
        return float(value[int(self.item)] if self.item else value)


ADAM = SecondMoment("exp_avg_sq", "betas", "1")

# Optimizers of torch and other libraries, by the name of the class or of one that it inherits from. None: it keeps no
# second moment, or one whose decay is not constant. What is not here and has two `betas` is treated like Adam.
OTHERS: dict[str, SecondMoment | None] = {
    "Adadelta": SecondMoment("square_avg", "rho"),
    "Adamax": SecondMoment("", "betas", "1"),  # a decaying maximum
    "Adan": SecondMoment("exp_avg_sq", "betas", "2"),  # the paper's beta3 is 1 minus this
    "AdaPNM": ADAM,  # the third beta is the weight of the older momentum
    "Lion": None,  # both betas are of the momentum
    "PNM": None,  # the second beta is the weight of the older momentum
    "RMSprop": SecondMoment("square_avg", "alpha"),
}


def decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """The decay of the second moment in a parameter group, or None where none is known.

    Three betas mean different things to different authors. So they are not guessed at for unknown classes.

    Args:
        optimizer: Of this package, torch or another library.
        group: One of its parameter groups.

    Example:
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
        >>> decay(adam, adam.param_groups[0])
        0.999
    """
    found = _of_page(optimizer) if isinstance(optimizer, Optimizer) else _of_table(optimizer, group)
    return None if found is None else found.decay(group)


def mean_square(optimizer: torch.optim.Optimizer) -> SecondMoment | None:
    """The slot with the mean of the squared gradient of each element; None where not every parameter has one.

    The mean must start at zero, so that dividing by 1 - decay^t removes the bias.

    Example:
        >>> from lightning_optim import AdamW, Lion
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> mean_square(AdamW([weight]))
        SecondMoment(slot='exp_avg_sq', option='betas', item='1')
        >>> mean_square(Lion([weight])) is None
        True
    """
    if not isinstance(optimizer, Optimizer):
        found = _of_table(optimizer, optimizer.defaults)
        return found if found is not None and found.slot else None
    kept = set.intersection(*(set(optimizer.slots_of(i, p)) for i, p in optimizer.every_parameter()))
    for name, slot in optimizer.slots.items():
        if name in kept and slot.mean_square_by:
            starts = [slot.start(SimpleNamespace(**optimizer.options_of(group))) for group in optimizer.param_groups]
            return _parsed(name, slot.mean_square_by) if not any(starts) else None
    return None


def _of_page(optimizer: Optimizer) -> SecondMoment | None:
    for name, slot in optimizer.slots.items():
        if slot.mean_square_by:
            return _parsed(name, slot.mean_square_by)
        if slot.second_moment_by:
            return _parsed("", slot.second_moment_by)
    return None


def _of_table(optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> SecondMoment | None:
    for cls in type(optimizer).__mro__:
        if cls.__name__ in OTHERS:
            return OTHERS[cls.__name__]
    return ADAM if len(options.get("betas", ())) == 2 else None


def _parsed(slot: str, where: str) -> SecondMoment:
    option, _, item = where.partition(".")
    return SecondMoment(slot, option, item)
