"""The fast engine for CPUs without a C++ compiler: the update as a sequence of in-place torch calls on blocks.

Plain torch walks over memory once per operation. Here a program is printed as Python code (`printer.py`), and that code
runs on blocks small enough to stay in the cache, so main memory is read and written once (`blocks.py`). Small tensors
are packed into one block, which makes many of them as cheap as one. Floats are arguments of the code, so none of them
causes it to be printed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines import passes
from lightning_optim.engines.blocked.blocks import Pack, Spread, packs, walk
from lightning_optim.engines.blocked.printer import Code, code_of
from lightning_optim.engines.plan import Plan
from lightning_optim.engines.step import Batch, Step
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol
from lightning_optim.language.values import By

name = "blocked"


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why this engine cannot serve, in one sentence; empty where it can."""
    if why := passes.unserved(programs, params):
        return why
    if any(p.device.type != "cpu" for p in params):
        return "a parameter is not on the CPU."
    return ""


def prepare(step: Step) -> None:
    """Nothing: this engine needs no kernels."""


def run(step: Step) -> None:
    """Run a step, block by block."""
    step.hand_out_gradients()
    passes.run(step, _Backend())


class _Backend:
    """The backend of plans that runs printed torch calls on blocks."""

    def launches(self, batch: Batch) -> list[Pack]:
        alone = bool(batch.program.scalars or batch.program.axes)
        if (name, alone) not in batch.cache:
            batch.cache[name, alone] = packs(batch.params, alone)
        return batch.cache[name, alone]  # type: ignore[no-any-return]

    def reduce(self, plan: Plan[Pack], of: tuple[Symbol, ...], by: By) -> Tensor:
        code = code_of(plan.program, of)
        results = []
        for pack, values_of in zip(plan.launches, _numbers(plan, code), strict=True):
            sums = [0.0 if by == "sum" else -torch.inf] * len(of)
            for views in walk(pack, code, False, 0, _counters(code, values_of), _spread(plan, code)):
                values = code.run(views, [values_of[symbol] for symbol in code.numbers])
                if by == "sum":
                    sums = [x + float(value.sum(dtype=torch.float64)) for x, value in zip(sums, values, strict=True)]
                else:
                    sums = [_larger(x, float(value.max())) for x, value in zip(sums, values, strict=True)]
            results.append(sums)
        return torch.tensor(results, dtype=torch.float64, device="cpu")

    def store(self, plan: Plan[Pack], buffers: tuple[str, ...]) -> None:
        for _ in self._stored(plan, buffers):
            pass

    def add_up(self, plan: Plan[Pack], of: tuple[Symbol, ...]) -> list[list[Tensor]]:
        stacks, summed = plan.statistics.stacks, tuple(dict.fromkeys(symbol.args[0] for symbol in of))
        kinds = [stacks.axes.index(symbol.axes) for symbol in of]
        sums = [stacks.zeros(which) for which in kinds]
        code = code_of(plan.program, summed)
        for pack, values_of in zip(plan.launches, _numbers(plan, code), strict=True):
            (param,), (position,) = pack.params, pack.positions
            stack, starts = stacks.of_position[position]
            low = 0
            for views in walk(pack, code, False, 0, _counters(code, values_of), _spread(plan, code)):
                values = code.run(views, [values_of[symbol] for symbol in code.numbers])
                for symbol, which, total in zip(of, kinds, sums, strict=True):
                    x = values[summed.index(symbol.args[0])]
                    stack.strides.add_up(which, total[param.compute_dtype][starts[which] :], x, low)
                low += len(views[0])
        return [stacks.split(which, total) for which, total in zip(kinds, sums, strict=True)]

    def write(self, plan: Plan[Pack], outputs: tuple[str, ...]) -> None:
        for pack in self._stored(plan, outputs):
            plan.step.written += pack.params

    def _stored(self, plan: Plan[Pack], names: tuple[str, ...]) -> Iterator[Pack]:
        """Compute and store outputs or buffers of one pack after another."""
        code = code_of(plan.program, tuple(map(plan.program.value, names)), names)
        for pack, values_of in zip(plan.launches, _numbers(plan, code), strict=True):
            numbers = [values_of[symbol] for symbol in code.numbers]
            for views in walk(pack, code, True, plan.batch.t, _counters(code, values_of), _spread(plan, code)):
                code.run(views, numbers)
            yield pack


def _larger(a: float, b: float) -> float:
    """The larger of two numbers; NaN where one of them is."""
    return b if b > a or b != b else a


def _numbers(plan: Plan[Pack], code: Code) -> list[dict[Symbol, float]]:
    """For each pack, the numbers that the code takes."""
    counters = [arg for symbol in code.normals.values() for arg in symbol.args if isinstance(arg, Symbol)]
    values: dict[Symbol, Any] = {symbol: plan.numbers[symbol] for symbol in (*code.numbers, *counters)}
    vectors = {symbol: value.tolist() for symbol, value in values.items() if isinstance(value, Tensor) and value.dim()}
    same = {symbol: float(value) for symbol, value in values.items() if symbol not in vectors}
    if not vectors:
        return [same] * len(plan.launches)
    return [
        {**same, **{symbol: numbers[pack.positions[0]] for symbol, numbers in vectors.items()}}
        for pack in plan.launches
    ]


def _counters(code: Code, values_of: dict[Symbol, float]) -> dict[str, tuple[int, int]]:
    """The seed and the step of each input that holds normal numbers, by name."""
    counters = {}
    for word, symbol in code.normals.items():
        low, high, t = (int(values_of[arg]) if isinstance(arg, Symbol) else int(arg) for arg in symbol.args)
        counters[word] = (high << 32 | low, t)
    return counters


def _spread(plan: Plan[Pack], code: Code) -> Spread:
    """A function that writes the numbers of a statistic for a block."""

    def spread(word: str, position: int, out: Tensor, low: int) -> Tensor:
        symbol, stacks = code.statistics[word], plan.statistics.stacks
        stack, starts = stacks.of_position[position]
        which = stacks.axes.index(symbol.axes)
        return stack.strides.spread(which, plan.statistics.flat(symbol, out.dtype)[starts[which] :], out, low)

    return spread
