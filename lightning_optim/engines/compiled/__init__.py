"""The fastest engine for CPUs with a C++ compiler: the update as one loop, compiled once for a machine.

The kernel is printed from the program (`printer.py`), compiled in a few tenths of a second (`compiler.py`), and stored
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
from lightning_optim.engines.compiled import compiler, printer
from lightning_optim.engines.compiled.compiler import without_compiler
from lightning_optim.engines.kernels import Kernel, KernelBackend
from lightning_optim.engines.launch import Launch
from lightning_optim.engines.step import Step
from lightning_optim.language.program import Program

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

    def build(self, kernel: Kernel) -> Callable[..., None]:
        """The compiled function, with the codebooks of its formats as its first argument."""
        codebooks = {form.codebook.name: form.codebook.searchable() for form in kernel.formats if form.codebook}
        addresses = [codebooks[word].data_ptr() for word in kernel.arguments if word in codebooks]
        pointers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        return functools.partial(compiler.load(source(kernel)), pointers)

    def call(self, kernel: Kernel, built: Callable[..., None], launch: Launch, given: dict[str, Any]) -> None:
        numbers = (ctypes.c_double * max(len(kernel.numbers), 1))(*(given[word] for word in kernel.numbers))
        values, partials = given.get("values"), given.get("partials")
        table, tiles, t = launch.table.data_ptr(), launch.tiles.data_ptr(), given.get("t", 0)
        of_tensors, sums = (
            None if values is None else values.data_ptr(),
            None if partials is None else partials.data_ptr(),
        )
        threads = torch.get_num_threads()
        launch.ran = True
        if threads == 1 or launch.count < THREADED:
            built(table, tiles, 0, launch.count, numbers, of_tensors, t, sums)
            return

        def run_tiles(first: int, last: int) -> None:
            built(table, tiles, first, last, numbers, of_tensors, t, sums)

        bounds = [launch.count * i // threads for i in range(threads + 1)]
        parts: list[Future[None]] = []
        try:
            for first, last in itertools.pairwise(bounds):
                parts.append(_pool(threads, os.getpid()).submit(run_tiles, first, last))
        finally:
            wait(parts)  # also if this thread is interrupted: they write to tensors that may be freed then
        for part in parts:
            part.result()

    def combine(self, kernel: Kernel, partials: Tensor, launch: Launch) -> Tensor:
        """Combine the results of one tile after another, so that the order is always the same."""
        shape = (len(launch.params), kernel.sums)
        if kernel.by == "sum":
            return partials.new_zeros(shape).index_add_(0, launch.tiles, partials)
        of = launch.tiles.long()[:, None].expand_as(partials)
        return partials.new_full(shape, -torch.inf).scatter_reduce_(0, of, partials, "amax")


BACKEND = _Backend()


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
