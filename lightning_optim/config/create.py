"""An optimizer from its name, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.errors import OptionError, shown

# Keys of a spec that act in a Trainer only, with what does the same without a spec.
NEEDS_TRAINER = {
    "schedule": "use one of torch.optim.lr_scheduler",
    "communication": "add lightning_optim.callbacks.Communication to the Trainer",
}


def create_optimizer(spec: Any, model_or_params: nn.Module | Iterable[Any], **options: Any) -> Optimizer:
    """An optimizer from its name or a mapping, for a module or for parameters.

    For a module, biases and the parameters of normalization layers have no weight decay (see `no_decay` of
    `OptimizerStrategy`). What needs a Trainer is refused, or warned of: the callback of a recipe is not created.
    `ConfiguredOptimizer` brings all of a spec to a Trainer.

    Args:
        spec: `"adan"`, `{"name": "adan", "lr": 2e-3}`, a class or its path such as `"torch.optim.SGD"`, or an
            `OptimizerStrategy`.
        model_or_params: A module, or parameters or parameter groups as for `torch.optim`.
        options: Options that replace those of `spec`.

    Returns:
        The optimizer. Type checkers take it for one of ours, which all words make.

    Raises:
        OptionError: for an unknown name or option, or a value of the wrong type or out of range; for a schedule or
            communication, which need a Trainer; and for roles or patterns with parameters that have no module.

    Example:
        >>> optimizer = create_optimizer("adamw", nn.Linear(2, 2), lr=1e-3)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.001, 0.01), (0.001, 0.0)]
    """
    if "name" in options:
        raise OptionError(f"create_optimizer got {shown(spec)} and name={shown(options['name'])}. Give one name.")
    strategy = OptimizerStrategy.parse(spec, **options)
    for key, instead in NEEDS_TRAINER.items():
        if getattr(strategy, key) is not None:
            raise OptionError(
                f"create_optimizer makes an optimizer alone, and {key}={shown(strategy.config[key])} needs a Trainer. "
                f"Use ConfiguredOptimizer, or leave it out and {instead}."
            )
    lengths = strategy.kind.lengths
    options_of_groups = [strategy.options, *(group.options for group in strategy.groups)]
    if any(given.get(name) == "total" for given in options_of_groups for name in lengths):
        raise OptionError(
            f"create_optimizer makes an optimizer alone, and 'total' as {' or '.join(lengths)} is the length of a run, "
            "which a Trainer knows. Use ConfiguredOptimizer, or give a number of steps."
        )
    if not isinstance(model_or_params, nn.Module):
        params = isinstance(strategy.config.get("adamw"), list) or "params" in strategy.config.get("adamw", {})
        for key in ("no_decay", "full_precision", "groups", "layer_decay", "freeze", *(["adamw"] if params else [])):
            if strategy.config.get(key):
                raise OptionError(
                    f"create_optimizer got parameters, and {key}={shown(strategy.config[key])} is by their names and "
                    "roles in a module. Give it the module, or parameter groups without that option."
                )
    optimizer: Optimizer = strategy.create(model_or_params)
    for title in strategy.recipe.callbacks:
        warnings.warn(
            f"create_optimizer makes {type(optimizer).__name__} for {strategy.name!r}, without its callback {title}, "
            f"which needs a Trainer. Use ConfiguredOptimizer, or add lightning_optim.callbacks.{title} to the Trainer.",
            stacklevel=2,
        )
    return optimizer
