"""How a step runs in passes over the elements, and between them the numbers that follow from sums.

A reduction cuts the update into passes: a pass computes again what its sums need and contributes to them, and these
are combined over tensors and ranks; the last pass writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.plan import Backend, Plan
from lightning_optim.engines.step import Step
from lightning_optim.language.symbols import Symbol


def run(step: Step, backend: Backend[Any]) -> None:
    """Run a step with one pass, and one or two more for each level of reductions."""
    counted = any(batch.program.counts for batch in step.batches)
    elements = float(sum(param.numel for param in step.params)) if counted else 0.0
    plans = [Plan(batch, step, elements, backend) for batch in step.batches]
    levels = max((batch.program.levels for batch in step.batches), default=0)
    for level in range(1, levels + 1):
        _reduce(plans, level, step)
    shared: dict[str, Any] = {}
    for plan in plans:
        plan.write(shared)
    for slot, value in shared.items():
        step.shared[slot].fill_(float(value))


def _reduce(plans: Sequence[Plan[Any]], level: int, step: Step) -> None:
    """Compute all reductions of one level, for all tensors, and combine them.

    Reductions with the same key belong together, whatever the program; each key takes one call, of all tensors.
    """
    found: dict[tuple[Any, ...], list[tuple[Plan[Any], Symbol, Tensor]]] = {}
    for plan in plans:
        sums = plan.program.sums(level)
        for (key, symbol), partial in zip(sums, plan.partials([symbol for _, symbol in sums]), strict=True):
            found.setdefault(key, []).append((plan, symbol, partial))
    for (over, by, _), entries in found.items():
        partials = [partial for _, _, partial in entries]
        groups = [own for plan, symbol, _ in entries for own in plan.process_groups(symbol)]
        totals = step.reductions.reduce_vector(torch.cat(partials), groups, over, by)
        parts = torch.split(totals, [len(partial) for partial in partials])
        for (plan, symbol, _), part in zip(entries, parts, strict=True):
            plan.numbers[symbol] = part[0] if over == "all" else part
