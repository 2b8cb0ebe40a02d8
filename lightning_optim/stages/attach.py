"""Attach a stage to any optimizer: to ours, where it runs in the pass of the update, or to another, after its step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

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
    return optimizer.register_step_post_hook(guest.after_step).remove


class _Guest:
    """A stage that runs by itself after the step of an optimizer that is not ours.

    Such optimizers take an empty state as the sign of a first step, so a slot is put there only after the step in
    which its parameter first had a gradient; a slot that starts as a copy of the parameter is kept here until then.
    """

    def __init__(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        self.stage = stage
        self.programs = Programs(lambda p, g, s, h: stage.update(p, s, h.stage), ())
        self.first: dict[Tensor, dict[str, Tensor]] = {
            p: self._new(p) for group in optimizer.param_groups for p in group["params"]
        }

    def _new(self, p: Tensor) -> dict[str, Tensor]:
        options = SimpleNamespace()
        return {
            name: slot.empty(p, storage.dtype(p.dtype, 32, slot), options, {})
            for name, slot in self.stage.slots.items()
        }

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return
        for p in moved:
            first = self.first.pop(p, None) or {}
            for name in self.stage.slots:
                if name not in optimizer.state[p]:
                    optimizer.state[p][name] = first[name] if name in first else self._new(p)[name]
        options = self.stage.advance()
        if options is None:
            return
        h = {"stage": options}
        program = self.programs(h)
        params = [p for group in optimizer.param_groups for p in group["params"] if _has(optimizer, p, self.stage)]
        rows = [
            make_row(p, None, {name: optimizer.state[p][name] for name in self.stage.slots}, self.stage.slots)
            for p in params
        ]
        engines.choose("auto", [program], rows).run(Step([Job(program, h, rows)], {}, Placement(params)))


def _has(optimizer: torch.optim.Optimizer, p: Tensor, stage: Stage) -> bool:
    return p in optimizer.state and all(name in optimizer.state[p] for name in stage.slots)
