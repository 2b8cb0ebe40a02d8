"""The fastest engine for CPUs with a C++ compiler: the update as one loop, compiled once for a machine.

The kernel is printed from the program (`printer.py`), compiled in a few tenths of a second (`engines/cpp`), and stored
in the user's cache folder, so later processes only load it. It depends on the flags of the optimizer and on dtypes, but
not on shapes, learning rates or the number of tensors. Without a compiler the blocked engine runs the step.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines import passes
from lightning_optim.engines.compiled import printer
from lightning_optim.engines.compiled.strips import Strips
from lightning_optim.engines.cpp import compiler
from lightning_optim.engines.cpp.compiler import without_compiler
from lightning_optim.engines.kernels import Kernel, KernelBackend, arguments_of
from lightning_optim.engines.launch import Launch
from lightning_optim.engines.plan import Plan
from lightning_optim.engines.step import Step
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol

name = "compiled"

THREADED = 32  # the least number of tiles for which starting threads pays


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why this engine cannot serve, in one sentence; empty where it can."""
    if why := passes.unserved(programs, params):
        return why
    if any(p.device.type != "cpu" for p in params):
        return "a parameter is not on the CPU."
    return without_compiler()


def prepare(step: Step) -> None:
    """Have all kernels of a step, before another rank is told that this engine runs it."""
    BACKEND.prepare(step)


def run(step: Step) -> None:
    """Run a step: for each launch one or two calls for each level of reductions, and one for the last pass."""
    passes.run(step, BACKEND)


class _Backend(KernelBackend):
    """The backend of plans that runs compiled C++."""

    name = name
    served = tuple(printer.TYPES)
    by_alignment = False
    tile = printer.TILE
    print = staticmethod(printer.print_pass)
    print_reduction = staticmethod(printer.print_reduction)
    print_means = staticmethod(printer.print_means)

    def build(self, kernel: Kernel) -> Callable[..., None]:
        """The compiled function, with the codebooks of its formats as its first argument."""
        codebooks = {form.codebook.name: form.codebook.searchable() for form in kernel.formats if form.codebook}
        addresses = [codebooks[word].data_ptr() for word in kernel.arguments if word in codebooks]
        pointers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        return functools.partial(compiler.load(compiler.Source(source(kernel))), pointers)

    def call(
        self,
        kernel: Kernel,
        built: Callable[..., None],
        launch: Launch,
        given: dict[str, Any],
        strips: Sequence[int] | None = None,
    ) -> None:
        """As in the base class; tiles of one strip run in one thread.

        Args:
            strips: The first tile of each strip, and the end of the last one; None where each tile is one.
        """
        numbers = (ctypes.c_double * max(len(kernel.numbers), 1))(*(given[word] for word in kernel.numbers))
        table, tiles, t = launch.table.data_ptr(), launch.tiles.data_ptr(), given.get("t", 0)
        of_tensors, sums, windows = (
            given[word].data_ptr() if word in given else None for word in ("values", "partials", "windows")
        )
        read = (ctypes.c_void_p * max(len(kernel.statistics), 1))(*(given[x].data_ptr() for x in kernel.statistics))
        threads = torch.get_num_threads()
        bounds = _bounds(strips or range(launch.count + 1), threads)

        def run_tiles(first: int, last: int) -> None:
            built(table, tiles, first, last, numbers, of_tensors, t, sums, read, windows)

        launch.ran = True
        if threads == 1 or bounds[-1] - bounds[0] < THREADED:
            run_tiles(bounds[0], bounds[-1])
            return
        parts: list[Future[None]] = []
        try:
            for first, last in itertools.pairwise(bounds):
                parts.append(_pool(threads, os.getpid()).submit(run_tiles, first, last))
        finally:
            wait(parts)  # also if this thread is interrupted: they write to tensors that may be freed then
        for part in parts:
            part.result()

    def add_up(self, plan: Plan[Launch], of: tuple[Symbol, ...]) -> list[list[Tensor]]:
        stacks = plan.statistics.stacks
        strips = [_strips(plan, launch, of) for launch in plan.launches]
        needed: dict[torch.dtype, int] = {}
        for own in strips:
            needed[own.dtype] = max(own.needed, needed.get(own.dtype, 0))
        sums = {dtype: torch.zeros(size, dtype=torch.float64, device="cpu") for dtype, size in needed.items()}
        for launch, own in zip(plan.launches, strips, strict=True):
            kernel, built = launch.kernels[plan.program][of, "mean"]
            given = {**arguments_of(kernel, plan, launch), "partials": sums[own.dtype], "windows": own.windows}
            own.run(sums[own.dtype], functools.partial(self.call, kernel, built, launch, given))
        parts = {own.dtype: own.parts(sums[own.dtype]) for own in strips}
        return [
            stacks.split(which, {dtype: of_each[i] for dtype, of_each in parts.items()})
            for i, which in enumerate(strips[0].which)
        ]

    def combine(self, kernel: Kernel, partials: Tensor, launch: Launch) -> Tensor:
        """Combine the results of one tile after another, so that the order is always the same."""
        shape = (len(launch.params), kernel.sums)
        if kernel.by == "sum":
            of_each = [(partials.new_zeros(shape[0]), numbers) for numbers in partials.unbind(1)]
            # Each sum for itself: torch adds up rows, of one number too, ten times as slowly.
            return torch.stack([total.index_add_(0, launch.tiles, numbers) for total, numbers in of_each], 1)
        of = launch.tiles.long()[:, None].expand_as(partials)
        return partials.new_full(shape, -torch.inf).scatter_reduce_(0, of, partials, "amax")


BACKEND = _Backend()


def _strips(plan: Plan[Launch], launch: Launch, of: tuple[Symbol, ...]) -> Strips:
    """The strips of a launch for some means, which it keeps."""
    kept = launch.kernels[plan.program]
    if (of, "strips") not in kept:
        kept[of, "strips"] = Strips(launch, plan.statistics.stacks, of)
    return kept[of, "strips"]  # type: ignore[no-any-return]


def _bounds(strips: Sequence[int], threads: int) -> list[int]:
    """The first tile of each thread, and the end of the last one."""
    count = len(strips) - 1
    return [strips[count * i // threads] for i in range(threads + 1)]


def source(kernel: Kernel) -> str:
    """The whole source that is compiled: the functions for all kernels, those of the formats, and the kernel."""
    normals = [_file("normals.h")] if "normal_block(" in kernel.text else []
    functions = {form.name: form.cpp() for form in kernel.formats}
    return "\n".join([_file("functions.h"), *normals, *functions.values(), kernel.text])


@functools.cache
def _file(name: str) -> str:
    return resources.files("lightning_optim.engines.compiled").joinpath(name).read_text()


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """The threads of a process: a child of a fork has none of those of its parent."""
    return ThreadPoolExecutor(threads, "lightning_optim")
