"""Measures what a step costs the host, with launches replaced by nothing: `python -m benchmarks.host_time --page`.

On a GPU a step of a small model, or of many small tensors, lasts as long as its Python. Here the tensors are tiny, lie
on the CPU and say that the Triton engine serves them. Kernels are neither compiled nor launched. Steps of
`torch.optim.AdamW(fused=True)` on the same tensors take turns with them. Its kernel cannot be left out from here, so
its times hold the arithmetic of tensors of at most 64 elements.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.pages import RESULTS, table, write_part
from benchmarks.records import Record, commit, describe, machine, save
from benchmarks.shapes import Shape, gpt2_124m
from benchmarks.timing import as_after_many_steps
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.engines import native, triton

SMALL = 8  # the largest side of a tensor
VISITS, WARM = 5, 2  # turns of each optimizer, and steps of a turn that do not count: caches are as another left them
Make = Callable[[Sequence[dict[str, object]]], torch.optim.Optimizer]


def tiny_gpt2() -> list[Shape]:
    """As many tensors as GPT-2 has, with as many axes, and of almost no elements."""
    return [tuple(min(SMALL, side) for side in shape) for shape in gpt2_124m()]


def many() -> list[Shape]:
    """Ten thousand tensors of ten elements."""
    return [(10,)] * 10_000


CASES: dict[str, tuple[str, Callable[[], list[Shape]], int]] = {  # what it is, shapes, groups
    "gpt2": ("148 tensors", tiny_gpt2, 1),
    "gpt2 in groups": ("148 tensors in 10 groups", tiny_gpt2, 10),
    "many": ("10,000 tensors", many, 1),
}
GOALS = {"gpt2/adamw": 130, "gpt2/lamb": 300, "gpt2 in groups/adamw": 250, "many/adamw": 6000}  # microseconds


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Let the Triton engine serve tensors on the CPU, and neither compile nor launch a kernel."""
    with (
        mock.patch.object(triton, "refusal", _nothing),
        mock.patch.object(triton, "load", _nothing),
        mock.patch.object(triton, "run_kernel", _nothing),
    ):
        yield


def _nothing(*arguments: Any, **given: Any) -> str:
    return ""


def ours(name: str) -> Make:
    """A function that makes one of our optimizers."""
    page: Any = OPTIMIZERS[name]
    return lambda groups: page([dict(group) for group in groups], lr=1e-3, engine="triton")  # type: ignore[no-any-return]


def fused(groups: Sequence[dict[str, object]]) -> torch.optim.Optimizer:
    """Torch's AdamW, whose step is one call for all tensors of a group."""
    return torch.optim.AdamW([dict(group) for group in groups], lr=1e-3, fused=True)


def microseconds(shapes: Sequence[Shape], groups: int, makes: dict[str, Make], steps: int) -> Record:
    """Processor time of a step for each optimizer, in microseconds: where gradients stay, and where they have moved.

    Args:
        shapes: Of the parameters.
        groups: The number of parameter groups.
        makes: The optimizers by name. They take turns.
        steps: The number of steps of a turn.
    """
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    sets = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    of_groups: list[dict[str, object]] = [{"params": params[i::groups]} for i in range(groups)]
    optimizers = {name: make(of_groups) for name, make in makes.items()}
    found: Record = {name: {} for name in makes}
    for moved, kind in ((False, "stay"), (True, "move")):
        times: dict[str, list[float]] = {name: [] for name in makes}
        turns = itertools.cycle(sets if moved else sets[:1])
        for (name, optimizer), step in itertools.product([*optimizers.items()] * VISITS, range(steps + WARM)):
            for p, grad in zip(params, next(turns), strict=True):
                p.grad = grad
            begin = time.thread_time()
            optimizer.step()
            if step >= WARM:
                times[name].append(1e6 * (time.thread_time() - begin))
        for name, of_steps in times.items():
            ordered = sorted(of_steps)
            found[name][kind] = statistics.median(ordered)
            found[name][f"{kind}_10"] = ordered[len(ordered) // 10]
    return found


def report(found: Record) -> str:
    """The results as a table."""
    rows = []
    for case, (title, _, _) in CASES.items():
        for name, result in found.get("cases", {}).get(case, {}).items():
            base = found["cases"][case]["torch AdamW fused"]["stay"]
            goal = GOALS.get(f"{case}/{name}")
            numbers = [f"{result['stay']:,.0f}", f"{result['move']:,.0f}", f"{result['stay'] / base:.2f}"]
            rows.append([title, f"`{name}`" if name in OPTIMIZERS else name, *numbers, f"{goal:,}" if goal else ""])
    head = ["tensors", "optimizer", "gradients stay, µs", "gradients move, µs", "of torch's fused", "goal, µs"]
    return f"{describe(found['about'])} Commit: {found['code']}.\n\n{table(head, rows)}"


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "lamb"])
    parser.add_argument("--steps", type=int, default=60, help="of one turn, of 148 tensors; a tenth of them of 10,000")
    parser.add_argument("--python", action="store_true", help="look at tensors as steps do where there is no compiler")
    parser.add_argument("--out", type=Path, default=RESULTS / "host_time.json")
    parser.add_argument("--page", action="store_true", help="write the table into docs/speed.md")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    if given.python:
        native._looked = -1
    else:
        as_after_many_steps()
    found: Record = {"about": machine(), "code": commit(), "cases": {}}
    for case in given.cases:
        _, shapes, groups = CASES[case]
        makes: dict[str, Make] = {**{name: ours(name) for name in given.optimizers}, "torch AdamW fused": fused}
        steps = given.steps if len(shapes()) < 1000 else max(1, given.steps // 10)
        with without_launches():
            found["cases"][case] = microseconds(shapes(), groups, makes, steps)
        gc.collect()
        save(given.out, found)
    print(report(found))
    if given.page:
        write_part("speed.md", "host", report(found))


if __name__ == "__main__":
    main()
