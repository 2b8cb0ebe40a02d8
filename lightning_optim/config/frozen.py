"""Names of frozen parameters, for what is said of them when a fit starts."""

from __future__ import annotations

from torch import nn

from lightning_optim.distributed.names import named_parameters


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that need no gradient, by name."""
    return {name: p for name, p in named_parameters(module) if not p.requires_grad}


def some_of(names: list[str]) -> str:
    """The first names of a list, and how many there are.

    Example:
        >>> some_of(["a", "b"]), some_of(["a", "b", "c", "d"])
        ('a, b', 'a, b, c and 1 more')
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
