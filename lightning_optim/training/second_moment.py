"""Which option of an optimizer is the decay of its second moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# By the name of the class or of one that it inherits from, so that an Adan of another library is known as well: the
# option, and its position in it. None: there is no mean of squares, or none with a constant decay.
OPTIONS: dict[str, tuple[str, int | None] | None] = {
    "Adan": ("betas", 2),  # 1 minus the paper's beta3
    "AdaPNM": ("betas", 1),  # the third is the weight of the stale momentum
    "PNM": None,  # its second beta is that weight
    "Lion": None,  # its second beta is of the momentum
    "RMSprop": ("alpha", None),
    "ScalarRMSprop": ("alpha", None),
    "Adadelta": ("rho", None),
    "MomentEstimationSGD": ("beta", None),
}


def decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """The decay of the mean square in a parameter group, or None where it has none that could be told.

    Known classes are looked up. Of other classes a pair `betas` is taken for Adam's; three betas mean different things
    to different authors, so they are not guessed at.

    Example:
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
        >>> decay(adam, adam.param_groups[0])
        0.999
    """
    for cls in type(optimizer).__mro__:
        if cls.__name__ in OPTIONS:
            where = OPTIONS[cls.__name__]
            break
    else:
        where = ("betas", 1) if len(group.get("betas", ())) == 2 else None
    if where is None:
        return None
    value = group[where[0]] if where[1] is None else group[where[0]][where[1]]
    return float(value)
