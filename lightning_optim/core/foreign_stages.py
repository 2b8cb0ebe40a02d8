"""Attach a stage to any optimizer: to ours, where it runs in the pass of the update, or to another, around its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_optim import engines, storage
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.core.state_layout import first_value
from lightning_optim.distributed.placement import has_gradient
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.errors import OptionError
from lightning_optim.language.program import Programs
from lightning_optim.language.slot import Slot
from lightning_optim.stages.stage import Stage

# Slots of other libraries that are first moments, as torch.optim names them.
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")


def attach(stage: Stage, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Let `stage` run in every step of `optimizer`; returns what takes it away again.

    The stage's slots live in `optimizer.state[parameter]` in both cases, so they are saved with the optimizer.

    Raises:
        OptionError: where a stage of that name is attached already.
    """
    if isinstance(optimizer, Optimizer):
        optimizer.append(stage)
        return lambda: optimizer.remove(stage)
    guests = _GUESTS.setdefault(optimizer, [])
    if any(other.stage.name == stage.name for other in guests):
        raise OptionError(f"{type(optimizer).__name__} has a stage named {stage.name!r} already.")
    guest = _Guest(stage, optimizer)
    guests.append(guest)
    guests.sort(key=lambda guest: guest.stage.order)
    handles = [
        optimizer.register_load_state_dict_pre_hook(guest.before_load),
        optimizer.register_load_state_dict_post_hook(guest.after_load),
    ]
    if len(guests) == 1:
        _HOOKS[optimizer] = [
            optimizer.register_step_pre_hook(_before_step),
            optimizer.register_step_post_hook(_after_step),
        ]

    def detach() -> None:
        guests.remove(guest)
        for handle in [*handles, *([] if guests else _HOOKS.pop(optimizer, []))]:
            handle.remove()

    return detach


def waiting(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Slots of stages that come into the state of an optimizer of another library with its first step."""
    return {name: x for guest in _GUESTS.get(optimizer, []) for name, x in guest.first.get(p, {}).items()}


def stage_slots(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the slots that stages on an optimizer, ours or another, may keep in its state."""
    own = optimizer.stages if isinstance(optimizer, Optimizer) else [g.stage for g in _GUESTS.get(optimizer, [])]
    return {name for stage in own for name in stage.slots}


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let stages change the gradients, which are there only once the closure has run, where one is given."""
    acting = [guest for guest in _GUESTS.get(optimizer, []) if guest.stage.acts_before and guest.stage.in_pass]
    if not acting:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        for guest in acting:
            guest.gradients.run()
        return None

    def closed() -> Any:
        loss = closure()
        for guest in acting:
            guest.gradients.run()
        return loss

    return ((args[0], closed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closed})


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for guest in _GUESTS.get(optimizer, []):
        guest.after_step(optimizer)


class OnGradients:
    """Runs the `before` of a stage on the gradients of an optimizer, by itself and not in a pass of the update.

    Args:
        stage: The stage; its slots are in the optimizer's state, or in `waiting` before the first step.
        optimizer: Ours or another.
    """

    def __init__(self, stage: Any, optimizer: torch.optim.Optimizer) -> None:
        self.stage, self.optimizer = stage, optimizer
        self.programs = Programs(lambda g, _, s, h: stage.before(g, s, h.stage, h), ())

    @torch.no_grad()
    def run(self) -> None:
        """Change the gradients of the step that comes, which is not counted.

        Raises:
            OptionError: for a sparse gradient.
        """
        batches: dict[Any, Batch] = {}
        params = []
        for i, group in enumerate(self.optimizer.param_groups):
            options = {name: _numbers(value) for name, value in group.items() if _is_number(value)}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise OptionError(
                        f"{type(self.stage).__name__} cannot serve a sparse gradient of shape {tuple(p.shape)}. Use "
                        "Embedding(sparse=False)."
                    )
                state = self._state(p, i)
                t = int(state.get("step", 0)) + 1
                h = {**options, "t": float(t), "stage": self.stage.options()}
                program = self.programs(h)
                if not program.slots <= state.keys():
                    self._excuse(p, program.slots)
                    continue
                batch = batches.setdefault((i, t), Batch.of(program, h))
                own = {name: state[name] for name in program.slots}
                local = LocalParameter.of(p.grad, own, {name: self.stage.slots.get(name, Slot()) for name in own})
                local.global_index = self.stage.global_index_of(p) if program.normals else None
                batch.params.append(local)
                params.append(p)
        if batches:
            step = Step(list(batches.values()), {}, Reductions(params))
            engines.choose("auto", [batch.program for batch in step.batches], step.params).run(step)

    def _excuse(self, p: Tensor, names: Iterable[str]) -> None:
        """What a stage reads is not there before the first step, but after it must be."""
        if self.optimizer.state.get(p):
            raise OptionError(
                f"{type(self.stage).__name__} reads {', '.join(sorted(names))}, and {type(self.optimizer).__name__} "
                f"keeps {', '.join(map(str, self.optimizer.state[p]))}."
            )

    def _state(self, p: Tensor, i: int) -> Mapping[str, Any]:
        if isinstance(self.optimizer, Optimizer) and "step" not in self.optimizer.state[p]:
            self.optimizer.start_state(p, i)
        return {**waiting(self.optimizer, p), **self.optimizer.state.get(p, {})}


class OnWeights:
    """Runs the `update` of a stage on the parameters of an optimizer, by itself and not in a pass of the update.

    Args:
        stage: The stage; its slots are in the optimizer's state.
        optimizer: Ours or another.
    """

    def __init__(self, stage: Any, optimizer: torch.optim.Optimizer) -> None:
        self.stage, self.optimizer = stage, optimizer
        self.programs = Programs(self._formula, ())

    def _formula(self, p: Any, g: Any, s: Any, h: Any) -> Any:
        for name in h.present:
            getattr(s, name)
        return self.stage.update(p, s, h.stage)

    @torch.no_grad()
    def run(self, options: Mapping[str, Any]) -> None:
        """Let the stage act under these options, on every parameter that has its slots."""
        batches: dict[Any, Batch] = {}
        params = [p for group in self.optimizer.param_groups for p in group["params"] if self._has(p)]
        for p in params:
            state = self.optimizer.state[p]
            present = tuple(_moments(self.stage, state))
            if present not in batches:
                h = {"stage": options, "present": present}
                batches[present] = Batch.of(self.programs(h), h)
            batch = batches[present]
            own = {name: state[name] for name in batch.program.slots}
            slots = {name: self.stage.slots.get(name, Slot()) for name in own}
            batch.params.append(LocalParameter.of(p, own, slots))
        if batches:
            step = Step(list(batches.values()), {}, Reductions(params))
            engines.choose("auto", [batch.program for batch in step.batches], step.params).run(step)

    def _has(self, p: Tensor) -> bool:
        state = self.optimizer.state.get(p, {})
        return bool(state) and all(name in state for name in self.stage.slots_beside(_moments(self.stage, state)))


def _is_number(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(number, int | float) for number in numbers)


def _numbers(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)


class _Guest:
    """A stage that runs by itself around the step of an optimizer that is not ours.

    Such optimizers take an empty state as the sign of a first step, so a slot is put there only after the step in
    which its parameter first had a gradient; what it holds until then is kept here.
    """

    def __init__(self, stage: Any, optimizer: torch.optim.Optimizer) -> None:
        self.stage = stage
        self.gradients, self.weights = OnGradients(stage, optimizer), OnWeights(stage, optimizer)
        self.first: dict[Tensor, dict[str, Tensor]] = {
            p: self._new(p, stage.slots_beside(())) for group in optimizer.param_groups for p in group["params"]
        }
        self.saved: list[dict[str, Any]] = []

    def _new(self, p: Tensor, names: Any) -> dict[str, Tensor]:
        slots = {name: self.stage.slots[name] for name in names}
        return {n: first_value(s, p, storage.dtype(p.dtype, 32, s), {}) for n, s in slots.items()}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the step, and run the stage where it acts."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(map(has_gradient, params)):
            return
        for p in params:
            if p.grad is None:
                continue
            state = optimizer.state[p]
            first = self.first.pop(p, None) or {}
            names = self.stage.slots_beside(_moments(self.stage, state))
            missing = [name for name in names if name not in state]
            state.update({name: first[name] if name in first else self._new(p, [name])[name] for name in missing})
        options = self.stage.advance()
        if options is not None and self.stage.acts_after:
            self.weights.run(options)

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


def _moments(stage: Stage, state: Mapping[str, Any]) -> list[str]:
    """Names of the first moments in a state that a stage treats beside the weights."""
    return [name for name in stage.moments if isinstance(state.get(name), Tensor)]


_GUESTS: WeakKeyDictionary[torch.optim.Optimizer, list[_Guest]] = WeakKeyDictionary()
_HOOKS: WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = WeakKeyDictionary()
