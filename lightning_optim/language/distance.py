"""The estimated distance to the solution, one of all tensors.  Mishchenko & Defazio 2023, arXiv:2306.06101."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_optim.errors import OptionError
from lightning_optim.language.math import maximum, minimum, sqrt, where
from lightning_optim.language.recursions import given
from lightning_optim.language.values import Options, Value

# A distance beyond this is the infinity or NaN of a lost step, from which the estimate would not come back.
LARGEST = 1e30
# The letters of its options and values in print.
LETTERS = {
    **{"d0": "d₀", "d_coef": "κ", "growth_rate": "ρ"},
    **{"progress": "N̄", "hat": "d̂", "highest": "D̄", "longest": "d̄"},
}


class Distance(NamedTuple):
    """The estimate after a step.

    Attributes:
        d: The distance, which is a step size.
        d_max: The largest estimate so far.
        numerator: The progress so far, along the gradients.
    """

    d: Value
    d_max: Value
    numerator: Value


def distance(before: Distance, progress: Value, length: Value, h: Options) -> Distance:
    """The estimate after a step: it never falls, and its first growth, from d0, is not limited by `growth_rate`.

    It stays where all gradients were zero, and where one was not finite.

    Args:
        before: The estimate before the step.
        progress: The new numerator: the sum of step size times gradient times way from the start.
        length: The denominator: the norm of the sum of step size times gradient.
        h: The options, of which `d0`, `d_coef` and `growth_rate` are used.
    """
    d = before.d
    hat = h.d_coef * progress / length
    known = LARGEST - abs(hat) > 0
    highest = longest = maximum(before.d_max, hat)
    if given(h.growth_rate):
        longest = minimum(highest, where(d > h.d0, d, maximum(d, hat)) * h.growth_rate)
    return Distance(
        where(known, longest, d), where(known, highest, before.d_max), where(known, progress, before.numerator)
    )


def sum_decay(h: Options) -> Value:
    """The decay rate of both sums of the estimate: `beta3`, or the root of the second beta."""
    return h.beta3 if given(h.beta3) else sqrt(h.betas[1])


def sum_weight(d: Value, rate: Value, h: Options) -> Value:
    """The weight of a gradient in the denominator: its step size, or under `safeguard_warmup` d itself.

    A group of learning rate 0 stands still, and has no weight.
    """
    return where(h.lr > 0, d, 0.0) if h.safeguard_warmup else rate


def refuse_groups(owner: str, groups: Sequence[Mapping[str, Any]], alike: Sequence[str]) -> None:
    """Refuse parameter groups that one step size cannot serve.

    Args:
        owner: The optimizer, for messages.
        groups: The options of each group.
        alike: The options that must be the same in all groups.

    Raises:
        OptionError: where they differ in one of `alike`, or in learning rates that are neither the largest nor 0.
    """
    for name in alike:
        if any(group[name] != groups[0][name] for group in groups):
            raise OptionError(
                f"{owner}: {name} is {groups[0][name]} in its first parameter group and another in a later one. It "
                "estimates one d for all groups: give them the same."
            )
    rates = dict.fromkeys(group["lr"] for group in groups)
    if any(not isinstance(rate, float) for rate in rates):  # on a device, where the host does not look
        return
    if not rates.keys() <= {max(rates), 0.0}:
        raise OptionError(
            f"{owner}: its parameter groups have the learning rates {', '.join(map(str, rates))}. It finds one step "
            "size for all of them: give every group the same lr, or 0 to let it stand still."
        )
