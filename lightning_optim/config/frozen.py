"""Frozen parameters are left out of the groups. Say so, and say it again where one is trained later."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lightning_optim.core.optimizer import Optimizer
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


def watch(optimizer: Optimizer, module: nn.Module) -> None:
    """Warn once where a parameter gets a gradient that was frozen when the optimizer was made, and is not in it.

    Args:
        optimizer: The optimizer.
        module: Its module, with the parameters that are frozen now.
    """
    frozen = frozen_parameters(module)

    def look(*_: Any) -> None:
        late = [name for name, p in frozen.items() if p.grad is not None]
        if not late:
            return
        held = {p for _, p in optimizer.every_parameter()}
        if missing := [name for name in late if frozen[name] not in held]:
            handle.remove()
            warnings.warn(
                f"{type(optimizer).__name__} does not move {some_of(missing)}: frozen when it was made, and trained "
                "now. Add what is unfrozen by optimizer.add_param_group, as Lightning's BackboneFinetuning does, or "
                "make the optimizer before it is frozen.",
                stacklevel=2,
            )

    if frozen:
        handle = optimizer.register_step_post_hook(look)
