"""Attach a stage to any optimizer: to ours, where it runs in the pass of the update, or to another, after its step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_optim import engines, storage
from lightning_optim.distributed import Placement
from lightning_optim.engines.job import Job, Step, make_row
from lightning_optim.optimizer import Optimizer
from lightning_optim.stages.stage import Stage
from lightning_optim.trace import Programs


def attach(stage: Stage, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Let `stage` run in every step of `optimizer`; returns what takes it away again.

    The stage's slots live in `optimizer.state[parameter]` in both cases, so they are saved with the optimizer.
    """
    if isinstance(optimizer, Optimizer):
        optimizer.append(stage)
        return lambda: optimizer.remove(stage)
    guest = _Guest(stage, optimizer)
    _GUESTS.setdefault(optimizer, []).append(guest)
    handles = [
        optimizer.register_step_post_hook(guest.after_step),
        optimizer.register_load_state_dict_pre_hook(guest.before_load),
        optimizer.register_load_state_dict_post_hook(guest.after_load),
    ]

    def detach() -> None:
        _GUESTS[optimizer].remove(guest)
        for handle in handles:
            handle.remove()

    return detach


def waiting(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Slots of stages that come into the state of an optimizer of another library with its first step."""
    return {name: x for guest in _GUESTS.get(optimizer, []) for name, x in guest.first.get(p, {}).items()}


class _Guest:
    """A stage that runs by itself after the step of an optimizer that is not ours.

    Such optimizers take an empty state as the sign of a first step, so a slot is put there only after the step in
    which its parameter first had a gradient; a slot that starts as a copy of the parameter is kept here until then.
    """

    def __init__(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        self.stage = stage
        self.names = [name for name, slot in stage.slots.items() if slot.copies]
        self.programs = Programs(lambda p, g, s, h: stage.update(p, s, h.stage), ())
        self.first: dict[Tensor, dict[str, Tensor]] = {
            p: self._new(p) for group in optimizer.param_groups for p in group["params"]
        }
        self.saved: list[dict[str, Any]] = []

    def _new(self, p: Tensor) -> dict[str, Tensor]:
        options = SimpleNamespace()
        slots = {name: self.stage.slots[name] for name in self.names}
        return {n: slot.empty(p, storage.dtype(p.dtype, 32, slot), options, {}) for n, slot in slots.items()}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return
        for p in moved:
            first = self.first.pop(p, None) or {}
            for name in self.names:
                if name not in optimizer.state[p]:
                    optimizer.state[p][name] = first[name] if name in first else self._new(p)[name]
        options = self.stage.advance()
        if options is None:
            return
        h = {"stage": options}
        program = self.programs(h)
        params = [p for group in optimizer.param_groups for p in group["params"] if self._has(optimizer, p)]
        rows = [
            make_row(p, None, {name: optimizer.state[p][name] for name in self.names}, self.stage.slots) for p in params
        ]
        engines.choose("auto", [program], rows).run(Step([Job(program, h, rows=rows)], {}, Placement(params)))

    def _has(self, optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
        return p in optimizer.state and all(name in optimizer.state[p] for name in self.names)

    def before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Keep the stage's slots as they were saved: torch will cast all state to the type of the parameter."""
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        self.saved = [
            {name: state_dict["state"].get(index, {}).get(name) for name in self.stage.slots} for index in order
        ]

    def after_load(self, optimizer: torch.optim.Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, slots in zip(params, self.saved, strict=True):
            for name, value in slots.items():
                if value is not None and value.dtype != optimizer.state[p][name].dtype:
                    optimizer.state[p][name] = value.to(p.device, copy=True)
        self.saved = []


_GUESTS: WeakKeyDictionary[torch.optim.Optimizer, list[_Guest]] = WeakKeyDictionary()
