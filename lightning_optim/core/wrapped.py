"""The wrappers that Lightning's Trainer and Fabric put around an optimizer.

The class of a wrapper derives from the optimizer's, so it has its methods. It reads the optimizer's attributes, but
keeps what a method writes for itself, where no step finds it. So it hands the calls of methods on.
"""

from __future__ import annotations

from typing import Any

import torch

WRAPPED = "_optimizer"  # the attribute of a wrapper that holds the optimizer


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in a wrapper of Lightning; any other as it is."""
    inner = vars(optimizer).get(WRAPPED)
    return unwrapped(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def hand_on(cls: type[Any], base: type[Any]) -> None:
    """Let a class whose objects may be wrappers call the public methods of `base` on the optimizer in them.

    Args:
        cls: The class. Methods that it has from before `base` stay.
        base: The class of the optimizer.
    """
    before = cls.__mro__[: cls.__mro__.index(base)]
    for owner in base.__mro__[: base.__mro__.index(torch.optim.Optimizer)]:
        for name, method in vars(owner).items():
            if callable(method) and not name.startswith("_") and not any(name in vars(one) for one in before):
                setattr(cls, name, _handed_on(name, cls))


def _handed_on(name: str, cls: type[Any]) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = vars(self).get(WRAPPED)
        owner = super(cls, self) if inner is None else inner
        return getattr(owner, name)(*args, **kwargs)

    method.__name__ = name
    return method
