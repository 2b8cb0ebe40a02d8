"""`lr` of a module with a spec: what Lightning's finder of learning rates reads and writes."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from lightning_optim.config.scheduler import Scheduler
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.errors import OptionError
from lightning_optim.training.learning_rates import RATES, LearningRates

NAMES = ("lr", "learning_rate")  # that Lightning's finder looks for, in this order


class LearningRate:
    """The attribute `lr` of a module: the learning rate of `hparams.optimizer`.

    A module with an `lr` or `learning_rate` of its own keeps that: what its constructor sets, an attribute of its
    class, a parameter, or a hyper-parameter of that name.
    """

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        if "lr" in vars(module):
            return vars(module)["lr"]
        if (found := _of_class(module, "lr")) is not None:
            return found
        if _has_own(module) or _in_constructor(module):
            raise AttributeError("lr")
        strategy = _strategy(module)
        rate = None if strategy is None else _rate(strategy)
        if rate is None:
            raise AttributeError("lr")
        return rate

    def __set__(self, module: Any, value: Any) -> None:
        strategy = None if _has_own(module) or _in_constructor(module) else _strategy(module)
        if strategy is None or "lr" not in strategy.kind.options:
            vars(module)["lr"] = value
            return
        changed = OptimizerStrategy.parse(strategy, lr=value)
        for hparams in (module.hparams, module._hparams_initial):
            if "optimizer" in hparams:
                hparams["optimizer"] = changed.as_config()
        _tell_of_groups(changed)
        if module._trainer is not None:
            _follow(module, strategy, changed)


def _strategy(module: Any) -> OptimizerStrategy | None:
    try:
        found: OptimizerStrategy = module.optimizer_strategy()
    except OptionError:  # which is said when a Trainer has the module
        return None
    return found


def _rate(strategy: OptimizerStrategy) -> float | None:
    option = strategy.kind.options.get("lr")
    rate = strategy.options.get("lr", option.default if option else None)
    return None if rate is None else float(rate)


def _has_own(module: Any) -> bool:
    places = [vars(module), module._parameters, module._buffers, module._modules, module.hparams]
    return any(name in place for place in places for name in NAMES) or any(
        _of_class(module, name) is not None for name in NAMES
    )


def _of_class(module: Any, name: str) -> Any:
    """An attribute of one of its classes; the mixin hides those that come after it."""
    found = (vars(base)[name] for base in type(module).__mro__ if name in vars(base))
    return next((value for value in found if not isinstance(value, LearningRate)), None)


def _in_constructor(module: Any) -> bool:
    """Whether the constructor of a module is running, where the name is its author's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_varnames and frame.f_locals.get(code.co_varnames[0]) is module:
            return True
        frame = frame.f_back
    return False


def _tell_of_groups(strategy: OptimizerStrategy) -> None:
    """Say which groups do not follow the rate that was set."""
    from lightning.pytorch.utilities import rank_zero_info

    own = [f"{group.label!r} keeps lr={group.options['lr']}" for group in strategy.groups if "lr" in group.options]
    if own:
        rank_zero_info(f"lr of {strategy.name!r} is {_rate(strategy)} now; of its groups {', '.join(own)}.")


def _follow(module: Any, before: OptimizerStrategy, after: OptimizerStrategy) -> None:
    """Let a fit that has begun go on with the rates of another strategy, at its place in the schedule.

    Lightning's finder writes the rate that it has found into all groups after this, whatever their own rates and the
    schedule are, and leaves its smallest rate as the one that they began with. So rates are written before the next
    step.
    """
    old, new = _rates_by_parameter(module, before), _rates_by_parameter(module, after)
    for optimizer in module.trainer.optimizers:
        groups = optimizer.param_groups
        of_callbacks: LearningRates | None = vars(optimizer).get(RATES)
        scheduled = [group["lr"] for group in groups] if of_callbacks is None else of_callbacks.scheduled
        bases, rates = [], []
        for group, rate in zip(groups, scheduled, strict=True):
            p = next((p for p in group["params"] if p in new), None)
            bases.append(float(rate) if p is None else new[p])
            rates.append(bases[-1] * float(rate) / old[p] if p is not None and old[p] else bases[-1])
            if "initial_lr" in group:
                group["initial_lr"] = bases[-1]
        for config in module.trainer.lr_scheduler_configs:
            if getattr(config.scheduler, "optimizer", None) is optimizer and hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = list(bases)
        schedulers = (config.scheduler for config in module.trainer.lr_scheduler_configs)
        ours = next((one for one in schedulers if isinstance(one, Scheduler) and one.optimizer is optimizer), None)
        _write_before_step(optimizer, rates, ours)


def _rates_by_parameter(module: Any, strategy: OptimizerStrategy) -> dict[Any, float]:
    rate: Any = _rate(strategy)
    return {p: float(group.get("lr", rate)) for group in strategy.param_groups(module) for p in group["params"]}


def _write_before_step(optimizer: Any, found: list[float], scheduler: Scheduler | None) -> None:
    def write(*_: Any) -> None:
        handle.remove()
        # The first factor of a schedule may depend on the length of training, which is known when training starts.
        rates = found if scheduler is None else scheduler.get_lr()
        of_callbacks: LearningRates | None = vars(optimizer).get(RATES)
        if of_callbacks is not None:
            of_callbacks.scheduled = list(rates)
            for owner, factors in [*of_callbacks.factors.items()]:
                of_callbacks.scale(owner, factors)
            return
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    handle = optimizer.register_step_pre_hook(write)
