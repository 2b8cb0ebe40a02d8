"""The engine for GPUs: Triton kernels that are printed from the program, one call for all tensors of a launch.

The arithmetic is that of the reference engine, operation by operation in float32, and a parameter is rounded once.
Floats are arguments of a kernel, so a schedule causes no compilation. `passes.py` runs the passes in order.

Without a GPU the same kernels run in Triton's interpreter, which is slow and meant for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import linecache
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines import passes
from lightning_optim.engines.captures import capturing, follow_stream
from lightning_optim.engines.kernels import Kernel, KernelBackend, arguments_of
from lightning_optim.engines.launch import Launch
from lightning_optim.engines.plan import Plan
from lightning_optim.engines.step import LocalParameter, Step
from lightning_optim.engines.triton import printer
from lightning_optim.engines.triton.chunks import Chunk, chunks_of
from lightning_optim.engines.triton.levels import MOST, levels_of
from lightning_optim.engines.triton.spread import has_long_axis
from lightning_optim.errors import EngineError, first_line, pip_command
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol
from lightning_optim.storage.format import Format

name = "triton"

WARPS = 4
# With this bound on registers three instances run on a multiprocessor at a time. Without it the assembler spills one or
# two registers to fit in a fourth. Normal numbers are computed in float64, which takes more registers: two instances.
REGISTERS, REGISTERS_WITH_NORMALS = 168, 255
# Instructions bound kernels with codes. Six instances at a time hide their latencies better than five, and those with
# few operands need not spill.
REGISTERS_WITH_CODES, FEW = 80, 4


OLDEST = (3, 1)  # as pyproject.toml has it
UNCAPTURABLE = (
    "a CUDA graph is being captured, and its replays would all take the step that is being counted on the host now. "
    "Give the optimizer capturable=True."
)


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why this engine cannot serve, in one sentence; empty where it can."""
    if why := _missing():
        return why
    if why := passes.unserved(programs, params):
        return why
    if too_long := [tuple(p.shape) for p in params if any(has_long_axis(program, p) for program in programs)]:
        return f"a parameter of shape {too_long[0]} has an axis too long for its row and column means."
    if len(types := sorted({p.device.type for p in params})) > 1:
        return f"the parameters are on {' and '.join(types)}, which an optimizer for each can serve."
    if any(p.device.type != "cuda" for p in params) and not _interpreted():
        return "a parameter is not on a GPU (TRITON_INTERPRET=1, set before triton is imported, runs it on the CPU)."
    # Engines see a complex64 number as two float32 numbers.
    unserved = next((p.dtype for p in params if p.dtype not in (*printer.TYPES, torch.complex64)), None)
    return f"it computes in float32, and a parameter is {str(unserved).removeprefix('torch.')}." if unserved else ""


@functools.cache
def _missing() -> str:
    """Why there is no Triton that compiles the kernels, in one sentence; empty where there is."""
    if importlib.util.find_spec(name) is None:
        return f"triton is not installed ({pip_command(name)})."
    try:
        version = str(importlib.import_module(name).__version__)
    except Exception as error:  # a library that it loads is missing, or does not fit
        return f"triton does not import, for {first_line(error)} Install it anew: {pip_command(name)}"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        return f"triton {version} is installed, and the kernels need 3.1 or later ({pip_command(name)})."
    return ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def prepare(step: Step) -> None:
    """Have all kernels of a step, before another rank is told that this engine runs it."""
    BACKEND.prepare(step)


def run(step: Step) -> None:
    """Run a step: for each launch a few kernels for each level of reductions, and one for the last pass."""
    device = step.batches[0].params[0].param.device
    counted = all(batch.program.step_counter is not None or batch.group is None for batch in step.batches)
    if not counted and device.type == "cuda" and capturing():
        raise RuntimeError(UNCAPTURABLE)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        passes.run(step, BACKEND)
        if device.type == "cuda":
            follow_stream(step.batches, torch.cuda.current_stream())


class _Backend(KernelBackend):
    """The backend of plans that runs Triton kernels."""

    name = name
    served = tuple(printer.TYPES)
    by_alignment = True
    tile = printer.TILE
    print = staticmethod(printer.print_pass)
    print_reduction = staticmethod(printer.print_reduction)
    print_means = staticmethod(printer.print_means)

    def build(self, kernel: Kernel) -> Any:
        return load(kernel.name, kernel.text, kernel.formats)

    def call(self, kernel: Kernel, built: Any, launch: Launch, given: dict[str, Any], count: int | None = None) -> None:
        """As in the base class.

        Args:
            count: The number of instances; None for one of each tile.
        """
        codebooks = {form.codebook.name: form.codebook for form in kernel.formats if form.codebook}
        for word in codebooks.keys() & kernel.arguments.keys():
            given[word] = codebooks[word].values(launch.table.device)
        if kernel.values:
            given["values"] = given["values"].float()
        try:
            run_kernel(
                built, launch.count if count is None else count, launch.table, launch.tiles, **given, **options(kernel)
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of Triton, of the assembler, or of a C compiler that is missing, in its first call
            raise EngineError(_reason(error)) from error
        launch.ran = True

    def add_up(self, plan: Plan[Launch], of: tuple[Symbol, ...]) -> list[list[Tensor]]:
        stacks, summed = plan.statistics.stacks, list(dict.fromkeys(symbol.args[0] for symbol in of))
        kinds = [stacks.axes.index(symbol.axes) for symbol in of]
        sums = [stacks.zeros(which) for which in kinds]
        for launch in plan.launches:
            kernel, built = launch.kernels[plan.program][of, "mean"]
            chunks = _chunks(plan, launch)
            given = arguments_of(kernel, plan, launch)
            for chunk in chunks:
                values = torch.empty(len(summed), chunk.high - chunk.low, dtype=torch.float32, device=plan.device)
                tables = {
                    "picked": chunk.picked,
                    "offsets": chunk.offsets,
                    "collected": values,
                    "room": values.shape[1],
                }
                self.call(kernel, built, launch, {**given, **tables}, len(chunk.picked))
                for symbol, which, total in zip(of, kinds, sums, strict=True):
                    chunk.add_up(which, total[torch.float32], values[summed.index(symbol.args[0])])
        return [stacks.split(which, total) for which, total in zip(kinds, sums, strict=True)]

    def combine(self, kernel: Kernel, partials: Tensor, launch: Launch) -> Tensor:
        function = _functions()["combine_tiles"]
        constants = {"COUNT": kernel.sums, "MAXIMUM": kernel.by == "max", "MOST": MOST}
        for starts in levels_of(launch):
            combined = partials.new_empty(len(starts) - 1, kernel.sums)
            run_kernel(function, combined.numel(), partials, starts, combined, **constants, **options(kernel))
            partials = combined
        return partials


BACKEND = _Backend()
# What drivers, and Triton in their words, say of kernels that were compiled for a newer one.
OLD_DRIVER = ("unsupported toolchain", "device kernel image is invalid", "driver version is insufficient", "is too old")


def _reason(error: Exception) -> str:
    """Why a kernel cannot be compiled or run."""
    if any(words in str(error).lower() for words in OLD_DRIVER):
        return (
            f"the NVIDIA driver is too old for kernels of triton {importlib.import_module(name).__version__}: "
            f"{first_line(error)} Update the driver, or install the triton that belongs to the version of torch."
        )
    return f"a Triton kernel cannot be compiled or run: {first_line(error)}"


def _chunks(plan: Plan[Launch], launch: Launch) -> list[Chunk]:
    """The chunks of a launch, which it keeps."""
    kept = launch.kernels[plan.program]
    if "chunks" not in kept:
        kept["chunks"] = chunks_of(launch, plan.statistics.stacks)
    return kept["chunks"]  # type: ignore[no-any-return]


@functools.cache
def load(name: str, text: str, formats: tuple[Format, ...]) -> Any:
    """The Triton function `name` of some source code. Programs with the same code share it."""
    file = f"<lightning_optim {name} {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)  # Triton and tracebacks read it from there
    scope: dict[str, Any] = {**_functions(), "__name__": f"lightning_optim.printed.{name}"}
    for form in formats:
        scope.update({word: value for word, value in form.triton().items() if not word.startswith("__")})
    exec(compile(text, file, "exec"), scope)  # the code consists of our own symbols only
    _compute_keys(scope[name])
    return scope[name]


def _compute_keys(function: Any) -> None:
    """Compute the key of a function in Triton's cache after the keys of the functions that it calls.

    Triton begins with the caller, whose key then depends on what this process has compiled before: another process
    would not find its kernels.
    """
    if getattr(function, "hash", "") is not None:  # computed before, or interpreted
        return
    for word in function.fn.__code__.co_names:
        _compute_keys(function.fn.__globals__.get(word))
    function.cache_key  # noqa: B018  (a property that keeps what it computes)


@functools.cache
def _functions() -> dict[str, Any]:
    """The functions that every printed kernel may call, by name."""
    from lightning_optim.engines.triton import functions, normals
    from lightning_optim.storage import triton as shared

    modules = (functions, normals, shared)
    return {word: value for module in modules for word, value in vars(module).items() if not word.startswith("__")}


def options(kernel: Kernel) -> dict[str, Any]:
    """The options with which Triton compiles a kernel.

    Products and sums are not contracted, so that results equal those of torch.
    """
    registers = REGISTERS_WITH_NORMALS if kernel.integers else REGISTERS
    computed = kernel.formats and not any(form.codebook for form in kernel.formats)
    if computed and not kernel.integers and kernel.text.count("_at = ") <= FEW:
        registers = REGISTERS_WITH_CODES
    return {"num_warps": WARPS, "maxnreg": registers, "enable_fp_fusion": False}


_interpreting = threading.Lock()  # the interpreter keeps the instance that it runs in a global variable


def run_kernel(function: Any, count: int, *args: Any, **given: Any) -> None:
    """Run a number of instances of a kernel, on the device of its first argument."""
    device = args[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else _interpreting if _interpreted() else contextlib.nullcontext():
        function[(count,)](*args, **given)


def source(program: Program, params: Sequence[LocalParameter]) -> str:
    """The source code of the kernels that serve a program on local parameters like these, for people to read."""
    return "\n\n".join(kernel.text for kernel in BACKEND.kernels(program, params))
