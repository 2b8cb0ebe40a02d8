"""A step as passes over the elements, and between them the numbers that follow from sums, and whole matrices.

Reductions, means along axes and functions of whole matrices cut the program into passes. Each pass but the last
computes again what its cut needs, and returns sums over the local elements, or writes arguments of functions into
buffers. Partial sums are added up over tensors and ranks; functions are computed in torch, and later passes read their
results like slots. The last pass writes parameters and slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.global_index import exchange_of
from lightning_optim.distributed.plain import is_wrapper, memory_order
from lightning_optim.engines import matrices
from lightning_optim.engines.plan import REDUCTIONS, Backend, Plan
from lightning_optim.engines.step import Step
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol


def unserved(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why no engine that walks over memory can serve, in one sentence; empty where one can."""
    shapes = (p.shape for p in params if (order := memory_order(p)) and exchange_of(order, p.shape) is None)
    if any(program.normals for program in programs) and (shape := next(shapes, None)):
        return f"a parameter of shape {tuple(shape)} has its axes in an order in memory in which noise is not served."
    wrapper = next((type(p).__name__ for p in params if is_wrapper(p)), "")
    return f"a parameter is a {wrapper}, which is no memory of its own." if wrapper else ""


def run(step: Step, backend: Backend[Any]) -> None:
    """Run a step: for each level the passes that its cuts need, and the last pass."""
    counted = any(batch.program.counts for batch in step.batches)
    elements = float(sum(param.numel for param in step.params)) if counted else 0.0
    plans = [Plan(batch, step, elements, backend) for batch in step.batches]
    levels = max((batch.program.levels for batch in step.batches), default=0)
    for level in range(1, levels + 1):
        _reduce(plans, level, step)
        _average(plans, level, step)
        calls = [call for plan in plans for call in plan.calls(level)]
        step.exchanged |= any(call.param.home for call in calls)
        matrices.compute(calls)
    shared: dict[str, Any] = {}
    for plan in plans:
        plan.write(shared)
    for slot, value in shared.items():
        if isinstance(value, Tensor):
            step.shared[slot].copy_(value)
        else:
            step.shared[slot].fill_(value)


def _reduce(plans: Sequence[Plan[Any]], level: int, step: Step) -> None:
    """Compute all reductions of one level, for all tensors, and combine them.

    Reductions with the same key are combined over all batches, whatever their programs. All sums of a level travel
    between ranks in one message, and all maxima.
    """
    found: dict[tuple[Any, ...], list[tuple[Plan[Any], Symbol, Tensor]]] = {}
    for plan in plans:
        sums = plan.program.sums(level)
        for (key, symbol), partial in zip(sums, plan.partials([symbol for _, symbol in sums]), strict=True):
            found.setdefault(key, []).append((plan, symbol, partial))
    step.exchanged |= bool(found and step.reductions.process_groups)
    for by in REDUCTIONS:
        of_kind = [(over, entries) for (over, kind, _), entries in found.items() if kind == by]
        packed = [entry for _, entries in of_kind for entry in entries]
        if not packed:
            continue
        groups = [of_tensor for plan, symbol, _ in packed for of_tensor in plan.process_groups(symbol)]
        first = packed[0][0].device  # parameters may be on several GPUs
        partials = [partial.to(first) for _, _, partial in packed]
        values = step.reductions.reduce_vector(torch.cat(partials), groups, "tensor", by)
        totals = iter(torch.split(values, [len(partial) for partial in partials]))
        for over, entries in of_kind:
            mine = [next(totals) for _ in entries]
            every = torch.cat(mine)
            for (plan, symbol, _), total in zip(entries, mine, strict=True):
                number = total if over == "tensor" else every.sum() if by == "sum" else every.max()
                plan.numbers[symbol] = number.to(plan.device)


def _average(plans: Sequence[Plan[Any]], level: int, step: Step) -> None:
    """Compute all means along axes of one level, for all tensors: ranks exchange one message for each group of them."""
    found = [(plan, mean) for plan in plans for mean in plan.means(level)]
    groups = [mean.process_groups for _, mean in found]
    step.exchanged |= any(groups)
    totals = step.reductions.reduce_tensors([mean.total for _, mean in found], groups)
    for (plan, mean), total in zip(found, totals, strict=True):
        plan.statistics.values.setdefault(mean.symbol, []).append(mean.divided(total))
