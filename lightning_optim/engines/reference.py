"""The definition of right: the update, called on tensors, one tensor after another.

A reduction over more than the tensor at hand cannot be answered until every tensor has contributed, so the call
stops there, the contributions are combined, and the call starts again with the answer known. An update computes
new values and leaves the old ones alone, so starting again is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.distributed.philox import normals
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.language.math import evaluating
from lightning_optim.language.program import Program, namespace
from lightning_optim.language.symbols import State
from lightning_optim.language.values import By, Number, Over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

name = "reference"
PIECE = 1 << 16  # elements


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """It serves everything."""
    return ""


def run(step: Step) -> None:
    """Run a step on whole tensors."""
    calls = [_Call(batch, param, step) for batch in step.batches for param in batch.params]
    everything = sum(call.param.numel for call in calls)
    for call in calls:
        call.everything = everything
    shared: dict[str, Number] = {}
    waiting = calls
    while waiting:
        waiting = [call for call in waiting if not call.finished(shared)]
        _answer(waiting, step.reductions)
    for slot, value in shared.items():
        step.shared[slot].copy_(torch.as_tensor(value))


def _answer(waiting: list[_Call], reductions: Reductions) -> None:
    """Answer what calls wait for, all calls with the same question in one message.

    Which questions there are, and in what order, is the same on every rank, since the calls are.
    """
    questions = dict.fromkeys(call.asked for call in waiting)
    some_are_behind = any(over != "all" for over, _ in questions)
    for asked in questions:
        over, by = asked
        if over == "all" and some_are_behind:
            continue  # until those have come to the question as well
        asking = [call for call in waiting if call.asked == asked]
        groups = [call.groups for call in asking]
        if over == "axis":
            answers = reductions.reduce_tensors([call.partial for call in asking], groups)
        else:
            answers = reductions.reduce([call.partial for call in asking], groups, over, by)
        for call, answer in zip(asking, answers, strict=True):
            call.answers.append(answer)


class _NotYet(Exception):
    """The update asked for a reduction that needs other tensors first."""


class _Call:
    """One call of an update on one tensor, repeated until all its reductions are known."""

    def __init__(self, batch: Batch, param: LocalParameter, step: Step) -> None:
        self.batch, self.param, self.step = batch, param, step
        self.answers: list[Any] = []
        self.position = 0
        self.everything = 0
        self.asked: tuple[Over | Literal["axis"], By] = ("tensor", "sum")
        self.partial: Any = 0.0
        self.groups: tuple[ProcessGroup, ...] = ()

    def finished(self, shared: dict[str, Number]) -> bool:
        """Call the update; write what it returns, or report that it waits for a reduction."""
        self.position = 0
        param, dtype = self.param, self.param.compute_dtype
        s = State(self._read)
        try:
            with evaluating(self):
                grad = None if param.grad is None else param.grad.to(dtype)
                new = self.batch.program.formula(param.param.to(dtype), grad, s, namespace(self.batch.h))
        except _NotYet:
            return False
        tensors = [value for value in param.state.values() if isinstance(value, Tensor)]
        live = {tensor.data_ptr() for tensor in (param.param, *tensors) if tensor.numel()}
        results = {"p": new, **s.written}
        for slot, value in results.items():
            if isinstance(value, Tensor) and value.numel() and value.data_ptr() in live:
                results[slot] = value.clone()  # two slots may trade places
        quantized: dict[str, Tensor] = {}
        for slot, value in results.items():
            if slot in self.step.shared:
                shared[slot] = value
            elif slot != "p" and isinstance(param.state[slot], storage.Quantized):
                quantized[slot] = value.reshape(-1)
            else:
                target = param.param if slot == "p" else param.state[slot]
                target.copy_(torch.as_tensor(value))
        storage.write(param.state, quantized, self.batch.t)
        return True

    def _read(self, slot: str) -> Any:
        if slot in self.step.shared:
            return self.step.shared[slot]
        value = self.param.state[slot]
        if isinstance(value, storage.Quantized):
            return storage.read(self.param.state, [slot])[slot].view(self.param.param.shape)
        return value.to(self.param.compute_dtype) if value.dim() else value

    def total(self, x: Number, over: Over, by: By) -> Any:
        if self.position == len(self.answers):
            self.partial = _partial(x, by)
            self.groups = self.param.process_groups if isinstance(x, Tensor) and x.dim() > 0 else ()
            if over == "tensor" and not self.groups:
                self.answers.append(self.partial)
            else:
                self.asked = (over, by)
                raise _NotYet
        self.position += 1
        return self.answers[self.position - 1]

    def count(self, over: Over) -> float:
        return float(self.param.numel if over == "tensor" else self.everything)

    def mean(self, x: Tensor, axis: int) -> Tensor:
        groups = () if self.param.shard is None else self.param.shard.process_groups_along(axis)
        if not groups:
            return x.mean(axis, keepdim=True)
        assert self.param.shard is not None
        if self.position == len(self.answers):
            self.partial, self.groups = x.sum(axis, keepdim=True, dtype=torch.float64), groups
            self.asked = ("axis", "sum")
            raise _NotYet
        self.position += 1
        total: Tensor = self.answers[self.position - 1]
        return (total / self.param.shard.shape[axis]).to(x.dtype)

    def normal(self, seed_low: float, seed_high: float, t: float) -> Tensor:
        param = self.param
        assert param.global_index is not None
        part = (param.global_index, 0, param.param.numel())
        flat = normals(int(seed_high) << 32 | int(seed_low), int(t), [part], param.param.device, param.compute_dtype)
        return flat.view(param.param.shape)


def _partial(x: Any, by: By) -> Any:
    """The sum, in float64, or the maximum of what this process holds of a tensor."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if by == "sum" and x.numel() <= PIECE:
        return x.sum(dtype=torch.float64)
    if by == "sum":  # piece by piece: torch makes a float64 copy of all that it sums
        return torch.stack([part.sum(dtype=torch.float64) for part in torch.split(x.reshape(-1), PIECE)]).sum()
    return x.max().double() if x.numel() else torch.tensor(-torch.inf, dtype=torch.float64)
