"""Step times on a CPU: each optimizer compared with `torch.optim.AdamW(fused=True)` on the same tensors.

Many optimizers with many parameters do not fit into memory together, and the speed of a machine changes over an hour.
So each comparison alternates between two optimizers, and its result is the ratio of their medians.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import bytes_that_must_move
from benchmarks.shapes import Shape
from benchmarks.timing import VISIT, as_after_many_steps
from lightning_optim import Optimizer, engines
from lightning_optim.reports.memory import state_memory

Make = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
Result = dict[str, Any]

FEWEST = 3  # rounds, however long they last
ALIGNED, SHIFT = 16, 1024  # elements


class Tensors:
    """Parameters of random numbers, and two sets of gradients that take turns.

    A gradient that never changes would make differences of gradients zero, and in a training backward puts nine of ten
    gradients elsewhere in each step. The two sets are views of one memory, some elements apart.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params: list[Tensor] = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02)) for shape in shapes
        ]
        sizes = [-(-math.prod(shape) // ALIGNED) * ALIGNED for shape in shapes]
        starts = [0, *itertools.accumulate(sizes)]
        numbers = torch.randn(starts[-1] + SHIFT, generator=generator).mul_(1e-3)
        self.sets = [
            [numbers[start + shift :][: p.numel()].view(p.shape) for start, p in zip(starts, self.params, strict=False)]
            for shift in (0, SHIFT)
        ]
        self.turn()

    def turn(self) -> None:
        """Give the parameters the other gradients."""
        self.sets.reverse()
        for p, grad in zip(self.params, self.sets[0], strict=True):
            p.grad = grad


class Side:
    """An optimizer that is being measured, with its times in milliseconds."""

    def __init__(self, make: Make, tensors: Tensors) -> None:
        self.tensors = tensors
        begin = time.perf_counter()
        self.optimizer = make(tensors.params)
        self.elapsed: list[float] = []
        self.busy: list[float] = []  # of all threads of the process: tells whether others disturbed
        self.step()
        self.first = time.perf_counter() - begin
        self.steps = 1

    def step(self) -> tuple[float, float]:
        """Milliseconds of a step with other gradients: elapsed, and of this process's threads."""
        self.tensors.turn()
        if isinstance(self.optimizer, Optimizer) and self.optimizer.inputs:
            self.optimizer.set_loss(1.0)
        busy, begin = time.process_time(), time.perf_counter()
        self.optimizer.step()
        return 1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - busy)

    def warm_up(self, steps: int) -> None:
        """Take some steps that do not count, and see from them how many make a visit."""
        shortest = min(self.step()[0] for _ in range(steps))
        self.steps = max(1, min(50, round(1e3 * VISIT / shortest)))

    def visit(self) -> None:
        """Some steps in a row. Where they are short, the caches are as the other left them, and one is left out."""
        if self.steps > 1:
            self.step()
        for _ in range(self.steps):
            elapsed, busy = self.step()
            self.elapsed.append(elapsed)
            self.busy.append(busy)

    def summary(self) -> Result:
        ordered = sorted(self.elapsed)
        return {
            "ms": statistics.median(ordered),
            "ms_10": ordered[len(ordered) // 10],
            "ms_90": ordered[(9 * len(ordered)) // 10],
            "busy_ms": statistics.median(self.busy),
            "steps": len(ordered),
        }


def measure(shapes: Sequence[Shape], base: Make, other: Make, rounds: int, longest: float, warm: int = 3) -> Result:
    """Step times of two optimizers that alternate on the same tensors.

    Args:
        shapes: Of the tensors.
        base: What the other is compared with.
        other: Who is measured.
        rounds: How often each is visited.
        longest: Seconds after which no round begins, once there were three.
        warm: Steps before that do not count.

    Returns:
        The times of both, their ratio, and what the other keeps and moves; nothing is kept after the call.

    Raises:
        Exception: what the constructor or the step of either raises.
    """
    as_after_many_steps()
    tensors = Tensors(shapes)
    sides = [Side(make, tensors) for make in (base, other)]
    for side in sides:
        side.warm_up(warm)
    end = time.monotonic() + longest
    for done in range(rounds):
        if done >= FEWEST and time.monotonic() > end:
            break
        for side in sides:
            side.visit()
    reference, found = (side.summary() for side in sides)
    optimizer = sides[1].optimizer
    state = sum(entry.bytes for entry in state_memory(optimizer))
    finite = all(bool(p.detach().isfinite().all()) for p in tensors.params)
    served = {}
    if isinstance(optimizer, Optimizer):
        served["served_by"] = engines.describe(optimizer.defaults["engine"], optimizer.first_programs(), tensors.params)
    return {
        **found,
        **served,
        "times_base": found["ms"] / reference["ms"],
        "times_base_busy": found["busy_ms"] / reference["busy_ms"],
        "base": reference,
        "first_step_s": sides[1].first,
        "state_bytes": state,
        "must_move_bytes": bytes_that_must_move(optimizer, state),
        **({} if finite else {"not_finite": True}),
    }


def bandwidths(values: int, rounds: int = 15) -> dict[str, float]:
    """Bytes per second, read and written, that this thread reaches with simple work on so many float32 values.

    A copy's target is first read into the caches on most machines, which is not counted here; `in place` reads and
    writes the same memory, as an optimizer does with its parameters and its state. The faster of the two is what
    steps are measured against.
    """
    source = torch.randn(values // 2)
    target = torch.empty_like(source)
    whole = torch.randn(values)
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "in place": (lambda: whole.mul_(-1.0), 2 * whole.nbytes),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (call, _) in work.items():
            call()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: size / statistics.median(times[name]) for name, (_, size) in work.items()}
