"""Lets two engines go on with the same results of functions of whole matrices, and compares their arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.comparison import check_values
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.engines import matrices
from lightning_optim.engines.matrices import Call


@dataclass
class SameMatrices:
    """What one engine computed in a step, for another that takes the same step.

    Attributes:
        found: Arguments, result and new slots of each call, by the index of its parameter and how many it had before.
        problems: What differs between arguments, in words.
    """

    found: dict[tuple[int, int], tuple[list[Tensor], Tensor, dict[Any, Tensor]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def recorded(self, optimizer: Optimizer) -> Iterator[None]:
        """Keep what is computed in a step of this optimizer."""
        compute = matrices.compute

        def record(keys: Sequence[tuple[int, int]], calls: Sequence[Call]) -> None:
            given = [[value.clone() for value in call.values] for call in calls]
            already = [set(call.param.pending) for call in calls]
            compute(calls)
            for key, call, values, before in zip(keys, calls, given, already, strict=True):
                new = {slot: x.clone() for slot, x in call.param.pending.items() if slot not in before}
                self.found[key] = values, call.values[0].clone(), new

        with _computing(optimizer, record):
            yield

    @contextlib.contextmanager
    def replayed(self, optimizer: Optimizer) -> Iterator[None]:
        """Compare arguments in a step of this optimizer, and give it the results that were kept."""

        def replay(keys: Sequence[tuple[int, int]], calls: Sequence[Call]) -> None:
            for key, call in zip(keys, calls, strict=True):
                given, result, new = self.found[key]
                for i, (value, own) in enumerate(zip(given, call.values, strict=True)):
                    words = f"shape {tuple(value.shape)}: argument {i} of {call.function!r}"
                    self.problems += check_values(words, value, own)
                call.values[0].copy_(result)
                call.param.pending.update(new)

        with _computing(optimizer, replay):
            yield


@contextlib.contextmanager
def _computing(optimizer: Optimizer, run: Callable[[list[tuple[int, int]], Sequence[Call]], None]) -> Iterator[None]:
    """Let another function compute the matrices of an optimizer."""
    compute, indices = matrices.compute, {id(p): i for i, (_, p) in enumerate(optimizer.every_parameter())}
    counts: dict[int, int] = {}

    def numbered(calls: Sequence[Call]) -> None:
        keys = []
        for call in calls:
            index = indices[id(call.param.source)]
            keys.append((index, counts.get(index, 0)))
            counts[index] = counts.get(index, 0) + 1
        if calls:
            run(keys, calls)

    matrices.compute = numbered
    try:
        yield
    finally:
        matrices.compute = compute
