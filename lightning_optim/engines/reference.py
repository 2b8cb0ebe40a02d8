"""The engine that defines what is correct: it calls the update on one tensor after another.

A reduction over all tensors, or over a sharded one, has no result before every tensor has contributed. So the call
stops there, the contributions are combined, and the call is repeated with the result. An update computes new values and
does not change old ones, so it can be called again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.distributed.philox import normals
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.engines import matrices
from lightning_optim.engines.matrices import Call
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.language.axes import as_axes
from lightning_optim.language.math import evaluating
from lightning_optim.language.matrices import MatrixFunction
from lightning_optim.language.program import Program, namespace
from lightning_optim.language.symbols import State
from lightning_optim.language.values import By, Number, Over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

name = "reference"
CHUNK = 1 << 16  # elements that are summed at once


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Empty: this engine can run every program."""
    return ""


def prepare(step: Step) -> None:
    """Nothing: this engine needs no kernels."""


def run(step: Step) -> None:
    """Run a step on whole tensors."""
    step.hand_out_gradients()
    for batch in step.batches:  # numbers of a device are read once for all tensors
        batch.h = {name: float(x) if isinstance(x, Tensor) else x for name, x in batch.h.items()}
    calls = [_Call(batch, param, step) for batch in step.batches for param in batch.params]
    elements = sum(call.param.numel for call in calls)
    for call in calls:
        call.elements = elements
    if any(batch.program.matrices for batch in step.batches):  # one may fail, and nothing has been written then
        waiting = calls
        while waiting:
            waiting = [call for call in waiting if call.outputs() is None]
            _reduce(waiting, step.reductions)
    shared: dict[str, Number] = {}
    waiting = calls
    while waiting:
        waiting = [call for call in waiting if not call.finished(shared)]
        _reduce(waiting, step.reductions)
    for slot, value in shared.items():
        _store(value, step.shared[slot])


def _reduce(waiting: list[_Call], reductions: Reductions) -> None:
    """Compute the reductions for which calls wait: one all-reduce for all calls that wait for the same kind.

    Every rank makes the same calls, so all ranks meet the same reductions in the same order.
    """
    kinds = dict.fromkeys(call.wanted for call in waiting)
    some_are_behind = any(over != "all" for over, _ in kinds)
    for wanted in kinds:
        over, by = wanted
        if over == "all" and some_are_behind:
            continue  # it needs all calls, and some have not come to it yet
        calls = [call for call in waiting if call.wanted == wanted]
        groups = [call.groups for call in calls]
        if over == "matrices":
            matrices.compute([call.partial for call in calls])
            results = [call.partial.values[0] for call in calls]
        elif over == "axis":
            results = reductions.reduce_tensors([call.partial for call in calls], groups)
        else:
            results = reductions.reduce([call.partial for call in calls], groups, over, by)
        for call, result in zip(calls, results, strict=True):
            call.results.append(result)


class _NotYet(Exception):
    """The update has come to a reduction that needs the contributions of other tensors first."""


class _Call:
    """One call of an update on one tensor, repeated until all its reductions have results."""

    def __init__(self, batch: Batch, param: LocalParameter, step: Step) -> None:
        self.batch, self.param, self.step = batch, param, step
        self.results: list[Any] = []  # of the reductions of the update, in the order in which it comes to them
        self.position = 0
        self.elements = 0
        self.wanted: tuple[Over | Literal["axis", "matrices"], By] = ("tensor", "sum")
        self.partial: Any = 0.0
        self.groups: tuple[ProcessGroup, ...] = ()

    def finished(self, shared: dict[str, Number]) -> bool:
        """Call the update and write its results; False where it waits for a reduction."""
        outputs = self.outputs()
        if outputs is None:
            return False
        self.write(outputs, shared)
        self.step.written.append(self.param)
        return True

    def outputs(self) -> dict[str, Any] | None:
        """Call the update: the new parameter ("p") and what it assigns to slots; None where it waits for others."""
        self.position = 0
        param, dtype = self.param, self.param.compute_dtype
        s = State(self._read)
        try:
            with evaluating(self):
                grad = None if param.grad is None else param.grad.to(dtype)
                new = self.batch.program.update(param.param.to(dtype), grad, s, namespace(self.batch.h))
        except _NotYet:
            return None
        return {"p": new, **s.written}

    def write(self, outputs: dict[str, Any], shared: dict[str, Number]) -> None:
        """Write what the update has returned and what it has assigned to slots."""
        param = self.param
        tensors = [value for value in param.state.values() if isinstance(value, Tensor)]
        live = {tensor.data_ptr() for tensor in (param.param, *tensors) if tensor.numel()}
        if not param.numel:  # the mean of no elements is no number: its slots stay as they are
            outputs = {slot: value for slot, value in outputs.items() if slot in self.step.shared and self.elements}
        for slot, value in outputs.items():
            if isinstance(value, Tensor) and value.numel() and value.data_ptr() in live:
                outputs[slot] = value.clone()  # two slots may exchange their values
        quantized = {slot: value for slot, value in outputs.items() if self._is_quantized(slot)}
        if quantized:  # first, since it needs memory and may not get it
            storage.write_shaped(param.state, quantized, self.batch.t)
        for slot, value in outputs.items():
            if slot in self.step.shared:
                shared[slot] = value
            elif slot not in quantized:
                target = param.param if slot == "p" else param.state[slot]
                _store(value, target)
        param.write_slots_of_matrices()

    def _is_quantized(self, slot: str) -> bool:
        return isinstance(self.param.state.get(slot), storage.Quantized)

    def _read(self, slot: str) -> Any:
        if slot in self.step.shared:
            return self.step.shared[slot].cpu()
        value = self.param.state[slot]
        if isinstance(value, storage.Quantized):
            value = storage.read_shaped(self.param.state, [slot])[slot].view(self.param.param.shape)
        return value.to(self.param.compute_dtype) if value.dim() else value.cpu()

    def total(self, x: Number, over: Over, by: By) -> Any:
        if self.position == len(self.results):
            self.partial = _partial(x, by)
            self.groups = self.param.process_groups if isinstance(x, Tensor) and x.dim() > 0 else ()
            if over == "tensor" and not self.groups:
                self.results.append(self.partial)
            else:
                self.wanted = (over, by)
                raise _NotYet
        self.position += 1
        return self.results[self.position - 1]

    def count(self, over: Over) -> float:
        return float(self.param.numel if over == "tensor" else self.elements)

    def mean(self, x: Tensor, axis: int | tuple[int, ...]) -> Tensor:
        axes, shard = as_axes(axis), self.param.shard
        groups = () if shard is None else shard.process_groups_along(axes)
        count = math.prod((self.param.param if shard is None else shard).shape[i] for i in axes)
        if not groups:
            return _sums_along(x, axes).div_(count).to(x.dtype)
        if self.position == len(self.results):
            self.partial, self.groups = _sums_along(x, axes), groups
            self.wanted = ("axis", "sum")
            raise _NotYet
        self.position += 1
        total: Tensor = self.results[self.position - 1]
        return total.div(count).to(x.dtype)

    def whole(self, function: MatrixFunction, values: tuple[Tensor, ...], numbers: tuple[float, ...]) -> Tensor:
        if self.position == len(self.results):
            copies = tuple(value.clone(memory_format=torch.contiguous_format) for value in values)
            self.partial, self.groups = Call(self.param, function, copies, tuple(map(float, numbers))), ()
            self.wanted = ("matrices", "sum")
            raise _NotYet
        self.position += 1
        return self.results[self.position - 1]  # type: ignore[no-any-return]

    def normal(self, seed_low: float, seed_high: float, t: float) -> Tensor:
        param = self.param
        if not self.batch.program.normals:  # nothing that this step writes depends on them
            return torch.zeros_like(param.param, dtype=param.compute_dtype)
        assert param.global_index is not None
        every = (param.global_index, 0, param.param.numel())
        flat = normals(int(seed_high) << 32 | int(seed_low), int(t), [every], param.param.device, param.compute_dtype)
        return flat.view(param.param.shape)


def _store(value: Any, target: Tensor) -> None:
    """Write a value of the update, which may be a number."""
    if isinstance(value, Tensor):
        target.copy_(value)
    else:
        target.fill_(value)


def _partial(x: Any, by: By) -> Any:
    """The sum in float64, or the maximum, of the local elements of a tensor."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if by == "sum" and x.numel() <= CHUNK:
        return x.sum(dtype=torch.float64)
    if by == "sum":  # in chunks: torch makes a float64 copy of everything that it sums
        return torch.stack([chunk.sum(dtype=torch.float64) for chunk in torch.split(x.reshape(-1), CHUNK)]).sum()
    return x.max().double() if x.numel() else torch.tensor(-torch.inf, dtype=torch.float64, device=x.device)


def _sums_along(x: Tensor, axes: Collection[int]) -> Tensor:
    """The sums in float64 of the local elements along some axes, each of which stays with size 1."""
    along = sorted(axis % x.dim() for axis in axes)
    if x.numel() <= CHUNK:
        return x.sum(along, keepdim=True, dtype=torch.float64)
    parts = torch.split(x, max(CHUNK * len(x) // x.numel(), 1))
    sums = [part.sum(along, keepdim=True, dtype=torch.float64) for part in parts]
    return torch.stack(sums).sum(0) if 0 in along else torch.cat(sums)
