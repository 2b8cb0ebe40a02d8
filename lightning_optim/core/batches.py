"""Who takes a step together: parameters sorted into batches once, and kept as long as what was sorted is the same.

A step of many small tensors is short, so what it does in Python for each of them counts. A roster does the sorting (by
group, counter and traits), the unwrapping (shards, complex numbers) and the look-ups once, and then asks each step only
whether anything moved: a parameter, a gradient that came or went, a slot that was replaced, a counter that somebody
else wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.shards import Placement, gradient_of, is_dtensor, local, refuse_unsummable
from lightning_optim.engines.step import Row, Rows, make_row
from lightning_optim.language.program import Program
from lightning_optim.language.slot import Slot
from lightning_optim.storage import Coded


@dataclass(slots=True)
class Batch:
    """Parameters that have the same options, counter and traits.

    Attributes:
        group: The number of their parameter group; None for those that have no gradient, which only stages serve.
        t: Their counter.
        traits: What their shape and type decide.
        rows: The parameters, as engines see them.
        params: The parameters.
        slots: Names of the slots that each of them has.
        summable: The programs that may run on them.
    """

    group: int | None
    t: int
    traits: dict[str, Any]
    rows: Rows = field(default_factory=Rows)
    params: list[Tensor] = field(default_factory=list)
    slots: frozenset[str] = frozenset()
    summable: set[Program] = field(default_factory=set)

    def admit(self, owner: str, program: Program) -> None:
        """Refuse a program whose sums cannot be taken over these parameters."""
        if program not in self.summable:
            refuse_unsummable(owner, program, self.params)
            self.summable.add(program)


class Roster:
    """The batches of one kind of step.

    Args:
        params: The parameters that take part, each with the number of its group and its gradient.
        idle: Those that only stages serve.
        state: The optimizer's state; everyone in it has a counter.
        traits: What a parameter's shape and type decide, by the number of its group.
        slots: The slots by name.
        flags: What the traits depend on besides; a roster holds for equal flags only.

    Attributes:
        batches: The parameters, sorted.
        placement: Sums over the processes that share them.
        engines: Who runs which programs for them.
    """

    def __init__(
        self,
        params: Sequence[tuple[int, Tensor]],
        idle: Sequence[tuple[int, Tensor]],
        state: Mapping[Tensor, dict[str, Any]],
        traits: Callable[[int, Tensor], dict[str, Any]],
        slots: Mapping[str, Slot],
        flags: Any,
    ) -> None:
        self.state, self.flags = state, flags
        self.params = [p for _, p in params]
        self.everyone = [*self.params, *(p for _, p in idle)]
        self.divided = any(is_dtensor(p) for p in self.everyone)
        self.placement = Placement(self.everyone)
        self.engines: dict[Any, Any] = {}
        self.ids = [id(p) for p in self.everyone]
        counters = _values([state[p]["step"] for p in self.params])
        found: dict[Any, Batch] = {}
        for (i, p), t in zip(params, counters, strict=True):
            own = traits(i, p)
            key = (i, t, *own.values())
            if key not in found:
                found[key] = Batch(i, t, own)
            self._add(found[key], p, slots)
        if idle:
            found["idle"] = Batch(None, 0, {})
            for _, p in idle:
                self._add(found["idle"], p, slots)
        self.batches = list(found.values())
        for batch in self.batches:
            batch.slots = frozenset.intersection(*(frozenset(row.state) for row in batch.rows))
        self.counter: Tensor | None = None  # all counters in one tensor, once they are counted together
        self._look()

    def _look(self) -> None:
        """Note where everything is."""
        state = self.state
        self.steps = [state[p]["step"] for batch in self.batches if batch.group is not None for p in batch.params]
        self.known = [id(value) for p in self.everyone for value in state[p].values()]
        values = [value for p in self.everyone for value in (p, *state[p].values())]
        parts = [
            part
            for value in values
            for part in ((value.codes, value.headers) if isinstance(value, Coded) else (value,))
        ]
        self.parts: list[Tensor] = parts
        self.placed = self._places()
        self.forms = self._forms()
        self.versions = self._versions()

    def _add(self, batch: Batch, p: Tensor, slots: Mapping[str, Slot]) -> None:
        state = {name: value for name, value in self.state[p].items() if name in slots}
        batch.rows.append(make_row(p, None, state, slots))
        batch.params.append(p)

    def _places(self) -> list[int]:
        parts = map(local, self.parts) if self.divided else self.parts
        return list(map(Tensor.data_ptr, parts))

    def _forms(self) -> list[Any]:
        """Of each parameter what engines go by besides its address: `p.data = p.data.t()` leaves it where it was."""
        return [list(map(Tensor.numel, self.everyone)), list(map(Tensor.is_contiguous, self.everyone))]

    def _versions(self) -> list[int]:
        return [step._version for step in self.steps]

    def holds(self, params: Iterable[Tensor], flags: Any) -> bool:
        """Whether it still describes these parameters and what is known of them."""
        same = self.flags == flags and self.ids == [id(p) for p in params] and self._kept()
        return same and (self.versions == self._versions() or self._recounted())

    def _kept(self) -> bool:
        """Whether all state is what it was, and all of it where it was and as it was."""
        states = map(self.state.__getitem__, self.everyone)
        values = itertools.chain.from_iterable(map(dict.values, states))
        same = self.known == list(map(id, values)) and self.placed == self._places()
        return same and self.forms == self._forms()

    def _recounted(self) -> bool:
        """Take counters that somebody else wrote; False where batches have fallen apart."""
        counters = iter(_values(self.steps))
        for batch in self.batches:
            if batch.group is not None:
                found = {next(counters) for _ in batch.params}
                if len(found) > 1:
                    return False
                batch.t = found.pop()
        self.versions = self._versions()
        return True

    def advance(self) -> None:
        """Count a step for everyone who takes part."""
        counter = self._count_together() if self.counter is None else self.counter
        counter.add_(1)
        self.versions = self._versions()
        for batch in self.batches:
            batch.t += batch.group is not None

    def _count_together(self) -> Tensor:
        """Make the counters views of one tensor: a thousand additions of a number each would take a thousand calls."""
        together = self.counter = torch.stack(self.steps)
        counters = iter(together.unbind())
        for batch in self.batches:
            if batch.group is not None:
                for p in batch.params:
                    self.state[p]["step"] = next(counters)
        self._look()
        return together

    def take_gradients(self) -> None:
        """Give the rows the gradients of this step."""
        for batch in self.batches:
            if batch.group is not None:
                for row, p in zip(batch.rows, batch.params, strict=True):
                    grad = p.grad if row.param is p and p.grad is not None else _fitting(row, p)
                    if grad is not None and grad.numel() != row.param.numel():
                        raise RuntimeError(
                            f"a gradient has the shape {tuple(grad.shape)}, and its parameter "
                            f"{tuple(row.param.shape)}. Did the parameter change after the backward pass?"
                        )
                    row.grad = grad

    def drop_gradients(self) -> None:
        """Hold on to no gradient, whose memory may be wanted before the next step."""
        for batch in self.batches:
            for row in batch.rows:
                row.grad = None


def has_gradient(p: Tensor) -> bool:
    """Whether a parameter takes part in a step; one of which this process holds no element does where others do."""
    return p.grad is not None or (not p.numel() and gradient_of(p) is not None)


def _fitting(row: Row, p: Tensor) -> Tensor | None:
    """The gradient as the row shows its parameter: the local part, real, with an axis."""
    grad = gradient_of(p)
    if grad is None:
        return None
    grad = local(grad)
    grad = torch.view_as_real(grad) if grad.is_complex() else grad
    return grad.view(row.param.shape)


def _values(steps: Sequence[Tensor]) -> list[int]:
    """The counters as numbers, all read at once."""
    return [int(t) for t in torch.stack(list(steps)).tolist()] if steps else []
