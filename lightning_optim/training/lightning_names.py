"""Lightning's classes under both of their names.

`pytorch_lightning` is a copy of `lightning.pytorch`, and `lightning_fabric` of `lightning.fabric`: their classes have
the same names and are others. A Trainer of either may have our callbacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

COPIES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


def is_a(value: Any, *classes: type) -> bool:
    """Whether `value` is an instance of a class of Lightning or of its copy, or of one derived from them."""
    return base_of(type(value), *classes) is not None


def base_of(cls: type, *classes: type) -> type | None:
    """The first class, among those from which `cls` is derived, that is one of `classes` or a copy of it."""
    wanted = {_plain(one) for one in classes}
    return next((base for base in cls.__mro__ if _plain(base) in wanted), None)


def overrides(value: Any, name: str, cls: type) -> bool:
    """Whether an instance of a class of Lightning, or of its copy, has a method of its own by that name.

    Args:
        value: The instance.
        name: The method.
        cls: The class of Lightning, such as LightningModule.
    """
    parent = base_of(type(value), cls)
    return parent is not None and is_overridden(name, value, parent)


def optimizers_in(configured: Any) -> Iterator[torch.optim.Optimizer]:
    """The optimizers in what `configure_optimizers` may return: one, a list, a list beside schedulers, mappings."""
    if isinstance(configured, torch.optim.Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from optimizers_in(item)


def _plain(cls: type) -> tuple[str, str]:
    package, _, rest = cls.__module__.partition(".")
    return f"{COPIES.get(package, package)}.{rest}", cls.__qualname__
