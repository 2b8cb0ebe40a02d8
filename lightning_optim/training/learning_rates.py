"""Factors on the learning rates of an optimizer that its schedulers do not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_optim.errors import OptionError


class LearningRates:
    """The scheduled learning rates of an optimizer, and the factors of callbacks on them.

    While callbacks have factors, `group["lr"]` is the scheduled rate times all factors. Only when a scheduler steps it
    is the scheduled rate, since many schedulers compute the next rate from the last. State dicts have scheduled rates
    too. So no factor gets into a checkpoint or is applied twice, and a run may resume with other factors.

    Use `learning_rates_of` to get that of an optimizer, and `release` when done.

    Args:
        optimizer: The optimizer.
        schedulers: Its schedulers.

    Attributes:
        scheduled: The rate of each parameter group without factors.
        factors: The factors for the groups, by the name of the callback.

    Raises:
        OptionError: if the optimizer does not use its learning rates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> None:
        self.optimizer = optimizer
        self.scheduled: list[float] = []
        self.factors: dict[str, Sequence[float]] = {}
        self._written: list[Any] = []  # the rates that were set last
        self._scheduler_steps = False
        self._read()
        self._undo: list[Callable[[], None]] = [_watch(scheduler, self) for scheduler in schedulers]
        self._undo.append(optimizer.register_state_dict_post_hook(self._write_to_state_dict).remove)
        self._undo.append(optimizer.register_load_state_dict_post_hook(lambda _: self._read()).remove)

    def scale(self, owner: str, factors: Sequence[float]) -> None:
        """Set the factor of each group, replacing the factors of the same owner."""
        self.factors[owner] = factors
        self._write()

    def release(self, owner: str) -> None:
        """Remove the factors of an owner. After the last one the optimizer is as it was before."""
        self.factors.pop(owner, None)
        if self.untouched():
            self._write()
        if not self.factors:
            while self._undo:
                self._undo.pop()()
            vars(self.optimizer).pop(RATES, None)

    def untouched(self) -> bool:
        """Whether nothing else has changed the learning rates."""
        groups = self.optimizer.param_groups
        return len(groups) == len(self._written) and all(
            group["lr"] is lr or (not isinstance(lr, Tensor) and group["lr"] == lr)
            for group, lr in zip(groups, self._written, strict=True)
        )

    def check(self) -> None:
        """Check that nothing else has changed a learning rate or added a group.

        Raises:
            OptionError: if something has. There is no way to tell whether such a rate includes the factors.
        """
        if self.untouched():
            return
        owners, name = " and ".join(sorted(self.factors)), type(self.optimizer).__name__
        raise OptionError(
            f"The learning rates of {name} are {[group['lr'] for group in self.optimizer.param_groups]}, and {owners} "
            f"had set {self._written}. Something else changes them, or adds groups, during the fit. Let a scheduler "
            "do that which configure_optimizers returns, or leave the one or the other out."
        )

    @contextmanager
    def scheduled_rates(self) -> Iterator[None]:
        """Set the scheduled rates for the step of a scheduler, and read the new ones after it."""
        if self._scheduler_steps:  # a scheduler that contains others
            yield
            return
        self.check()
        self._put(self.scheduled)
        self._scheduler_steps = True
        try:
            yield
        finally:
            self._scheduler_steps = False
            self._read()

    def _read(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if group["lr"] is None or group.get("warmup_init"):  # Adafactor
                raise OptionError(
                    f"{type(self.optimizer).__name__} does not use a learning rate in group {i} (lr={group['lr']}, "
                    f"warmup_init={group.get('warmup_init')}): it computes its own step size, which no factor changes."
                )
        self.scheduled = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._write()

    def _write(self) -> None:
        factors = self.factors.values()
        self._put([lr * math.prod(of_owner[i] for of_owner in factors) for i, lr in enumerate(self.scheduled)])

    def _put(self, rates: Sequence[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._written = [group["lr"] for group in self.optimizer.param_groups]

    def _write_to_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        for group, lr in zip(state_dict["param_groups"], self.scheduled, strict=True):
            group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr


def learning_rates_of(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> LearningRates:
    """The `LearningRates` of an optimizer, one for all callbacks. Schedulers of other optimizers are ignored."""
    if RATES not in vars(optimizer):
        its = [scheduler for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]
        vars(optimizer)[RATES] = LearningRates(optimizer, its)
    rates: LearningRates = vars(optimizer)[RATES]
    return rates


def _watch(scheduler: Any, rates: LearningRates) -> Callable[[], None]:
    """Let a scheduler step on scheduled rates. Its class is replaced, since all its attributes are its state."""
    cls = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with rates.scheduled_rates():
            return cls.step(self, *args, **kwargs)

    scheduler.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__})
    return lambda: setattr(scheduler, "__class__", cls)


RATES = "_rates_of_lightning_optim"  # the attribute of an optimizer, which lives as long as it
