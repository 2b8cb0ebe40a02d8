"""Factors on the learning rates of an optimizer, beside whatever schedules them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_optim.errors import OptionError


class LearningRates:
    """The learning rates that an optimizer's schedulers set, and those rates times the factors that callbacks hold.

    While a factor is held, `group["lr"]` is the scheduled rate times all factors, at any time that anyone looks. Only
    schedulers see their own rates when they step, since many compute the next rate from the last. State dicts hold
    the scheduled rates too: no factor gets into a checkpoint, so none can be applied twice, and a run may resume
    with other factors or without.

    Use `held` to get the one of an optimizer, and `release` when done.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> None:
        self.optimizer = optimizer
        self.scheduled: list[float] = []
        self.factors: dict[str, Sequence[float]] = {}
        self._written: list[Any] = []
        self._aside = False
        self._adopt()
        self._undo: list[Callable[[], None]] = [_watch(scheduler, self) for scheduler in schedulers]
        self._undo.append(optimizer.register_state_dict_post_hook(self._hand_out).remove)
        self._undo.append(optimizer.register_load_state_dict_post_hook(lambda _: self._adopt()).remove)

    def scale(self, owner: str, factors: Sequence[float]) -> None:
        """Hold a factor for each group, in the place of those that this owner held."""
        self.factors[owner] = factors
        self._write()

    def release(self, owner: str) -> None:
        """Give up an owner's factors; with the last owner the optimizer is as it was."""
        self.factors.pop(owner, None)
        if self.untouched():
            self._write()
        if not self.factors:
            while self._undo:
                self._undo.pop()()
            _HELD.pop(self.optimizer, None)

    def untouched(self) -> bool:
        """Whether the learning rates are those that were written here last."""
        groups = self.optimizer.param_groups
        return len(groups) == len(self._written) and all(
            group["lr"] is lr or (not isinstance(lr, Tensor) and group["lr"] == lr)
            for group, lr in zip(groups, self._written, strict=True)
        )

    def check(self) -> None:
        """Refuse to go on where somebody else has set a learning rate, or added a group.

        Raises:
            OptionError: Whether such a rate has the factors in it already cannot be known.
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
    def set_aside(self) -> Iterator[None]:
        """Show the scheduled rates, and take what they are afterwards as the scheduled rates."""
        if self._aside:  # a scheduler within a scheduler
            yield
            return
        self.check()
        self._put(self.scheduled)
        self._aside = True
        try:
            yield
        finally:
            self._aside = False
            self._adopt()

    def _adopt(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if group["lr"] is None or group.get("warmup_init"):  # Adafactor
                raise OptionError(
                    f"{type(self.optimizer).__name__} does not use a learning rate in group {i} (lr={group['lr']}, "
                    f"warmup_init={group.get('warmup_init')}): it makes its own steps, which no factor changes."
                )
        self.scheduled = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._write()

    def _write(self) -> None:
        held = self.factors.values()
        self._put([lr * math.prod(found[i] for found in held) for i, lr in enumerate(self.scheduled)])

    def _put(self, rates: Sequence[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._written = [group["lr"] for group in self.optimizer.param_groups]

    def _hand_out(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        for group, lr in zip(state_dict["param_groups"], self.scheduled, strict=True):
            group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr


def learning_rates_of(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> LearningRates:
    """The learning rates of an optimizer, with those of `schedulers` that are its own watched."""
    if optimizer not in _HELD:
        own = [scheduler for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]
        _HELD[optimizer] = LearningRates(optimizer, own)
    return _HELD[optimizer]


def _watch(scheduler: Any, rates: LearningRates) -> Callable[[], None]:
    """Let a scheduler step among its own rates. Its class is exchanged, since its state is all of its attributes."""
    cls = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with rates.set_aside():
            return cls.step(self, *args, **kwargs)

    scheduler.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__})
    return lambda: setattr(scheduler, "__class__", cls)


_HELD: dict[torch.optim.Optimizer, LearningRates] = {}
