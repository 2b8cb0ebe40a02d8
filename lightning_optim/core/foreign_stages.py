"""Attaches stages to any optimizer: in the pass of the update for our optimizers, around the step for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim import storage
from lightning_optim.core.attempt import Attempt
from lightning_optim.core.first_values import first_value
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.core.standalone_stages import OnGradients, OnWeights, moments_in
from lightning_optim.core.wrapped import unwrapped
from lightning_optim.distributed.placement import has_gradient
from lightning_optim.errors import OptionError
from lightning_optim.stages.stage import Stage


def attach(stage: Stage, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Attach a stage to an optimizer, in every step of which it runs.

    The slots of the stage are in `optimizer.state[parameter]`, so they are saved with the optimizer.

    Args:
        stage: The stage.
        optimizer: Any optimizer.

    Returns:
        A function that detaches the stage.

    Raises:
        OptionError: where a stage of that name is attached already.
    """
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, Optimizer):
        ours = optimizer
        ours.append(stage)
        return lambda: ours.remove(stage)
    if ATTACHED not in vars(optimizer):
        vars(optimizer)[ATTACHED] = _Attached(optimizer)
    attached: _Attached = vars(optimizer)[ATTACHED]
    if any(other.stage.name == stage.name for other in attached.stages):
        raise OptionError(f"{type(optimizer).__name__} has a stage named {stage.name!r} already.")
    foreign = _ForeignStage(stage, optimizer)
    attached.stages.append(foreign)
    attached.stages.sort(key=lambda one: one.stage.order)
    handles = [
        optimizer.register_load_state_dict_pre_hook(foreign.before_load),
        optimizer.register_load_state_dict_post_hook(foreign.after_load),
    ]

    def detach() -> None:
        attached.stages.remove(foreign)
        for handle in handles:
            handle.remove()
        if not attached.stages:
            attached.remove(optimizer)

    return detach


def pending_slots(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Slots of stages that enter the state of a foreign optimizer after its first step."""
    return {name: x for one in _stages_of(optimizer) for name, x in one.pending_of(p).items()}


def slots_beside(optimizer: torch.optim.Optimizer, like: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Slots of stages that a foreign optimizer's own slots bring along, for a parameter that looks like `like`."""
    found: dict[str, Tensor] = {}
    for one in _stages_of(optimizer):
        names = one.stage.slots_beside(moments_in(state, one.stage))
        found.update(one.create(like, [name for name in names if name not in one.stage.slots_beside(())]))
    return found


def on_gradients(stage: Stage, optimizer: torch.optim.Optimizer) -> OnGradients:
    """An object whose `run` applies the `before` of an attached stage to the gradients."""
    return OnGradients(stage, optimizer, lambda p: pending_slots(optimizer, p))


def stage_slots(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the slots that stages may keep in the state of an optimizer."""
    attached = [one.stage for one in _stages_of(optimizer)]
    stages = optimizer.stages if isinstance(optimizer, Optimizer) else attached
    return {name for stage in stages for name in stage.slots}


class _Attached:
    """The stages of an optimizer, in the order in which they run, and the hooks that run them.

    They are kept in an attribute of the optimizer, so that they live as long as it and nothing else knows them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.stages: list[_ForeignStage] = []
        self.hooks = [
            optimizer.register_step_pre_hook(_before_step),
            optimizer.register_step_post_hook(_after_step),
        ]

    def remove(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the optimizer as it was before the first stage."""
        for hook in self.hooks:
            hook.remove()
        vars(optimizer).pop(ATTACHED, None)


class _ForeignStage:
    """A stage that runs around the step of an optimizer of another library.

    Such optimizers recognize the first step by an empty state. So a slot enters the state after the first step in which
    its parameter has a gradient. From the step before which it is needed until then it is in `pending`.
    """

    def __init__(self, stage: Any, optimizer: torch.optim.Optimizer) -> None:
        self.stage, self.optimizer = stage, optimizer
        self.pending: dict[Tensor, dict[str, Tensor]] = {}
        self.gradients = on_gradients(stage, optimizer)
        self.weights = OnWeights(stage, optimizer)
        self.saved: list[dict[str, Any]] = []

    def pending_of(self, p: Tensor) -> dict[str, Tensor]:
        """The slots of a parameter that are not in the state yet, with the values that they have before a step."""
        if is_lazy(p):
            return {}
        if p not in self.pending:
            state, names = self.optimizer.state.get(p, {}), self.stage.slots_beside(())
            missing = [name for name in names if name not in state]
            if not missing:
                return {}
            self.pending[p] = self.create(p, missing)
        return self.pending[p]

    def before_step(self) -> None:
        """Keep the values that slots have before a step, for parameters that may take their first one."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self.pending_of(p)

    def create(self, p: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Slots of the stage as they are before a step."""
        slots = {name: self.stage.slots[name] for name in names}
        return {name: first_value(s, p, storage.dtype(p.dtype, 32, s), {}) for name, s in slots.items()}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the step, and run the stage if it acts in this step."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(map(has_gradient, params)):
            return
        for p in (p for p in params if p.grad is not None):
            state = optimizer.state[p]
            pending = self.pending.pop(p, {})
            names = self.stage.slots_beside(moments_in(state, self.stage))
            missing = [name for name in names if name not in state]
            created = self.create(p, [name for name in missing if name not in pending])
            state.update({name: pending[name] if name in pending else created[name] for name in missing})
        with Attempt(self.weights.has_moved, self.stage):
            options = self.stage.advance()
            if options is not None and self.stage.acts_after:
                self.weights.run(options)

    def before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Remember the slots as they were saved: torch casts all state to the dtype of the parameter."""
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        self.saved = [
            {name: state_dict["state"].get(index, {}).get(name) for name in self.stage.slots} for index in order
        ]

    def after_load(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the dtypes of the slots."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, slots in zip(params, self.saved, strict=True):
            for name, value in slots.items():
                if value is not None and value.dtype != optimizer.state[p][name].dtype:
                    optimizer.state[p][name] = value.to(p.device, copy=True)
        self.saved = []
        self.pending.clear()  # they were of other weights


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let stages change the gradients. If the step has a closure, gradients exist only after it."""
    for one in _stages_of(optimizer):
        one.before_step()
    acting = [one for one in _stages_of(optimizer) if one.stage.acts_before and one.stage.in_pass]
    lazy = any(is_lazy(p) for group in optimizer.param_groups for p in group["params"])
    if not acting and not lazy:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        for one in acting:
            one.gradients.run()
        return None

    def with_stages() -> Any:
        loss = closure()
        for one in _stages_of(optimizer) if lazy else ():
            one.before_step()
        for one in acting:
            one.gradients.run()
        return loss

    if len(args) > 1:
        return (args[0], with_stages, *args[2:]), kwargs
    return args, {**kwargs, "closure": with_stages}


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for one in _stages_of(optimizer):
        one.after_step(optimizer)


def _stages_of(optimizer: torch.optim.Optimizer) -> Sequence[_ForeignStage]:
    attached: _Attached | None = vars(optimizer).get(ATTACHED)
    return () if attached is None else attached.stages


ATTACHED = "_stages_of_lightning_optim"  # the attribute of an optimizer
