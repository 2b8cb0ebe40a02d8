"""Runs stages outside the pass of an update: on gradients before a step, or on weights after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim import engines
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.plain import writable_gradient
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.errors import OptionError
from lightning_optim.language.programs import Programs
from lightning_optim.language.slot import Slot
from lightning_optim.stages.stage import Stage

# The first moments in the state of torch.optim optimizers.
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")


class OnGradients:
    """Runs the `before` of a stage on the gradients of an optimizer.

    Args:
        stage: The stage.
        optimizer: Any optimizer.
        pending: A function that returns the slots of a parameter that are not in the state of the optimizer yet.
    """

    def __init__(
        self,
        stage: Any,
        optimizer: torch.optim.Optimizer,
        pending: Callable[[Tensor], Mapping[str, Tensor]],
    ) -> None:
        self.stage, self.optimizer, self.pending = stage, optimizer, pending
        self.programs = Programs(lambda g, _, s, h: stage.before(g, s, h.stage, h))

    @torch.no_grad()
    def run(self) -> None:
        """Change the gradients of the next step. It does not count as a step.

        Raises:
            OptionError: for a sparse gradient, and for a stage that reads slots which the optimizer does not have.
        """
        batches: dict[Any, Batch] = {}
        params = []
        for i, group in enumerate(self.optimizer.param_groups):
            options = {name: _as_floats(value) for name, value in group.items() if _is_number(value)}
            for p in (p for p in group["params"] if p.grad is not None):
                self._refuse_sparse(p)
                grad = writable_gradient(p)
                state = self._state(p, i)
                t = int(state.get("step", 0)) + 1
                h = {**options, "t": float(t), "stage": self.stage.options()}
                program = self.programs(h)
                if not program.slots <= state.keys():
                    self._refuse_missing(p, program.slots)
                    continue
                batch = batches.setdefault((i, t), Batch.of(program, h))
                batch.params.append(_local(self.stage, grad, {name: state[name] for name in program.slots}))
                batch.params[-1].global_index = self.stage.global_index_of(p) if program.normals else None
                params.append(p)
        _run(batches, params)

    def _refuse_sparse(self, p: Tensor) -> None:
        if p.grad is not None and p.grad.is_sparse:
            raise OptionError(
                f"{type(self.stage).__name__} cannot serve a sparse gradient of shape {tuple(p.shape)}. Use "
                "Embedding(sparse=False)."
            )

    def _refuse_missing(self, p: Tensor, names: Iterable[str]) -> None:
        """Refuse slots that the optimizer does not have; before its first step they may still be missing."""
        if self.optimizer.state.get(p):
            raise OptionError(
                f"{type(self.stage).__name__} reads {', '.join(sorted(names))}, and {type(self.optimizer).__name__} "
                f"keeps {', '.join(map(str, self.optimizer.state[p]))}."
            )

    def _state(self, p: Tensor, i: int) -> Mapping[str, Any]:
        if isinstance(self.optimizer, Optimizer) and "step" not in self.optimizer.state[p]:
            self.optimizer.start_state(p, i)
        if isinstance(self.optimizer, Optimizer):
            self.optimizer.follow_layout(p)
        return {**self.pending(p), **self.optimizer.state.get(p, {})}


class OnWeights:
    """Runs the `update` of a stage on the parameters of an optimizer.

    Args:
        stage: The stage. Its slots are in the optimizer's state.
        optimizer: Any optimizer.
    """

    def __init__(self, stage: Any, optimizer: torch.optim.Optimizer) -> None:
        self.stage, self.optimizer = stage, optimizer
        self.programs = Programs(self._update)
        self.moved = False

    def _update(self, p: Any, g: Any, s: Any, h: Any) -> Any:
        for name in h.present:
            getattr(s, name)  # so that `name in s` holds for the stage, as after an update
        return self.stage.update(p, s, h.stage)

    @torch.no_grad()
    def run(self, options: Mapping[str, Any]) -> None:
        """Run the stage under the given options, on every parameter that has its slots."""
        batches: dict[Any, Batch] = {}
        params = [p for group in self.optimizer.param_groups for p in group["params"] if self._has_slots(p)]
        for p in params:
            state = self.optimizer.state[p]
            present = tuple(moments_in(state, self.stage))
            if present not in batches:
                h = {"stage": options, "present": present}
                batches[present] = Batch.of(self.programs(h), h)
            slots = {name: state[name] for name in batches[present].program.slots}
            batches[present].params.append(_local(self.stage, p, slots))
        written: list[LocalParameter] = []
        try:
            _run(batches, params, written)
        finally:
            self.moved = bool(written)

    def has_moved(self) -> bool:
        """Whether the last call of `run` has written a parameter or a slot."""
        return self.moved

    def _has_slots(self, p: Tensor) -> bool:
        state = self.optimizer.state.get(p, {})
        return bool(state) and all(name in state for name in self.stage.slots_beside(moments_in(state, self.stage)))


def moments_in(state: Mapping[str, Any], stage: Stage) -> list[str]:
    """Names of the first moments in a parameter's state that the stage changes together with the weights."""
    return [name for name in stage.moments if isinstance(state.get(name), Tensor)]


def _local(stage: Any, tensor: Tensor, slots: dict[str, Any]) -> LocalParameter:
    return LocalParameter.of(tensor, slots, {name: stage.slots.get(name, Slot()) for name in slots})


def _run(batches: Mapping[Any, Batch], params: Sequence[Tensor], written: list[LocalParameter] | None = None) -> None:
    if batches:
        step = Step(list(batches.values()), {}, Reductions(params), written=[] if written is None else written)
        engine = engines.choose("auto", [batch.program for batch in step.batches], step.params)
        engines.run(step, engine, "auto", {})


def _is_number(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(number, int | float) for number in numbers)


def _as_floats(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)
