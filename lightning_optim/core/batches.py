"""Sorts parameters into batches, and caches the batches while nothing changes.

A step over many small tensors is short, so Python operations per tensor matter. `Batches` sorts parameters by parameter
group, step counter and traits, and unwraps shards and complex numbers, once. Later steps only check whether anything
changed: a parameter or slot (`watch.py`), whether it has a gradient, a step counter that other code has written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.gradients import Parameters, Seen
from lightning_optim.core.watch import Watch, is_same
from lightning_optim.distributed.owners import Home
from lightning_optim.distributed.placement import local
from lightning_optim.distributed.plain import resolved
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.engines.captures import capturing
from lightning_optim.engines.facts import Facts
from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.language.slot import Slot
from lightning_optim.language.view import View

VERSION = operator.attrgetter("_version")


class Batches:
    """The batches of one kind of program ("update" or "predict").

    Args:
        params: The parameters that take part, each with the index of its group.
        idle: Parameters without a gradient, on which only stages run.
        state: The state of the optimizer. Every parameter in it has a step counter.
        traits: A function of the index of a group and a parameter that returns the traits of the parameter.
        view: A function of the same that returns the matrices that the parameter is.
        home: A function of a parameter that returns which ranks compute these; None where each does by itself.
        slots: The declarations of all slots, by name.
        flags: What traits depend on besides. The batches are valid only for equal flags.

    Attributes:
        batches: The batches.
        active: Those of parameters with gradients.
        reductions: Combines partial sums over the ranks that hold shards of a tensor.
        engines: The engine for each combination of programs.
        complete: The programs for which all slots are there.
    """

    def __init__(
        self,
        params: Parameters,
        idle: Parameters,
        state: Mapping[Tensor, dict[str, Any]],
        traits: Callable[[int, Tensor], dict[str, Any]],
        view: Callable[[int, Tensor], View | None],
        home: Callable[[Tensor], Home | None],
        slots: Mapping[str, Slot],
        flags: Any,
    ) -> None:
        self.state, self.flags, self.given = state, flags, (params, idle)
        self.params = [p for _, p in params]
        self.all_params = [*self.params, *(p for _, p in idle)]
        self.reductions = Reductions(self.all_params)
        self.engines: dict[Any, Any] = {}
        self.complete: Any = None
        counters = _numbers([state[p]["step"] for p in self.params])
        found: dict[Any, Batch] = {}
        positions: dict[Any, list[int]] = {}
        for position, ((i, p), t) in enumerate(zip(params, counters, strict=True)):
            of_p = traits(i, p)
            key = (i, t, local(p).device, *of_p.values())
            positions.setdefault(key, []).append(position)
            batch = found.setdefault(key, Batch(group=i, traits=of_p, counter=t))
            self._add(batch, p, slots, view(i, p), home(p))
        self.active = list(found.values())
        self.positions = [torch.tensor(of, dtype=torch.int64, device="cpu") for of in positions.values()]
        if idle:
            found["idle"] = Batch()
            for i, p in idle:
                self._add(found["idle"], p, slots, view(i, p), home(p))
        self.batches = list(found.values())
        self.facts: Facts | None = None  # of the gradients of the step before
        self.slots = [batch.slots for batch in self.batches]
        known = {"step", *slots}
        foreign = any(name not in known for p in self.all_params for name in state[p])
        self.known = known if foreign else None  # names of slots, where other programs keep something beside them
        self.counters: list[Tensor] = []  # all step counters, in one tensor if possible, from the first `advance` on
        self._remember()

    def _add(self, batch: Batch, p: Tensor, slots: Mapping[str, Slot], view: View | None, home: Home | None) -> None:
        state = {name: value for name, value in self.state[p].items() if name in slots}
        batch.params.append(LocalParameter.of(p, state, slots, view, home))

    # ------------------------------------------------------------------ what must stay the same

    def _remember(self) -> None:
        """Store the identity and the address of everything to which the batches refer."""
        self.steps = [self.state[param.source]["step"] for batch in self.active for param in batch.params]
        self.watch = Watch(self.state, self.all_params, self.known)
        self.counted = self._counted()

    def _counted(self) -> Any:
        """What other code changes that writes a step counter: their values, or their versions on a device."""
        shared = self.counters[0] if len(self.counters) == 1 and self.counters[0].is_cpu else None
        return list(map(VERSION, self.steps)) if shared is None else shared.clone()

    def valid_for(
        self, params: Parameters, idle: Parameters, state: Mapping[Tensor, dict[str, Any]], flags: Any
    ) -> bool:
        """Whether the batches are still valid for what the constructor gets."""
        of_same = state is self.state and all(map(is_same, (params, idle), self.given)) and self.flags == flags
        return of_same and self.watch.sees_nothing() and (self._is_counted() or self._update_counters())

    def _is_counted(self) -> bool:
        """Whether no other code has written a step counter."""
        if isinstance(self.counted, Tensor):
            return torch.equal(self.counted, self.counters[0])
        return bool(self.counted == self._counted())

    def _update_counters(self) -> bool:
        """Read step counters that other code has written. False if the counters of a batch differ now."""
        if capturing():  # the host cannot wait for them
            return False
        counters = iter(_numbers(self.steps))
        for batch in self.active:
            of_batch = {next(counters) for _ in batch.params}
            if len(of_batch) > 1:
                return False
            batch.counter = of_batch.pop()
        self.counted = self._counted()
        return True

    # ------------------------------------------------------------------ the step

    def advance(self) -> None:
        """Count a step for all parameters that have gradients."""
        self.counters = self.counters or self._shared_counters()
        if len(self.counters) == 1:
            self.counters[0].add_(1)
        else:
            torch._foreach_add_(self.counters, 1)
        self.counted = self._counted()
        for batch in self.active:
            batch.counter += 1

    def advance_only(self, written: Iterable[LocalParameter]) -> None:
        """Count a step for those parameters that it has written before it failed. The batches are not valid then."""
        of_steps = {id(param) for batch in self.active for param in batch.params}
        for param in written:
            if id(param) in of_steps:
                self.state[param.source]["step"].add_(1)

    def _shared_counters(self) -> list[Tensor]:
        """Let the step counters share the memory of one tensor: one addition instead of one for each parameter.

        They stay the same tensors, since a state_dict that was kept refers to them. On a device they stay where they
        are, once they share memory: a graph may count them there.
        """
        for state in (self.state[param.source] for batch in self.active for param in batch.params):
            state["step"] = state["step"].to(torch.float32)  # pickles of earlier versions have counters that stop
        self._remember()
        on_device = self.steps[0].device.type != "cpu"
        if len(self.steps) == 1 or (on_device and any(x.untyped_storage().nbytes() > x.itemsize for x in self.steps)):
            return [step.data for step in self.steps]  # whose versions stay, by which writing of others is seen
        shared = torch.stack(self.steps)
        for i, step in enumerate(self.steps):
            step.set_(shared.untyped_storage(), i, (), ())
        self._remember()
        return [shared]

    def take_gradients(self, seen: Seen) -> None:
        """Hand the gradients of this step to the batches."""
        facts, grads = seen.facts, None
        if facts is None:
            grads = list(map(_local_gradient, seen.grads))
            facts = Facts.of(grads, self.facts) if set(map(type, grads)) <= {Tensor} else None
        for batch, positions in zip(self.active, self.positions, strict=True):
            whole = len(positions) == len(self.params)
            batch.grads = () if grads is None else grads if whole else [grads[i] for i in positions.tolist()]
            if facts is None or whole:
                batch.gradients = facts
            elif facts is not self.facts:
                batch.gradients = facts.at(positions)
        self.facts = facts

    def drop_gradients(self) -> None:
        """Drop references to gradients and buffers, whose memory may be needed before the next step."""
        for batch in self.batches:
            batch.drop()


def _local_gradient(grad: Tensor) -> Tensor:
    """The local gradient as real numbers."""
    grad = resolved(local(grad))
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _numbers(steps: Sequence[Tensor]) -> list[int]:
    """Step counters as numbers, read in one transfer."""
    return [int(t) for t in torch.stack(list(steps)).tolist()] if steps else []
