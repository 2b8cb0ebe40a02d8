"""The engine for GPUs: one launch for all tensors of a batch, of a kernel that is printed from the update.

The arithmetic is that of the reference, operation by operation in float32, and a parameter is rounded once. Floats
enter as arguments, so a schedule compiles nothing. How passes follow each other stands in `passes.py`.

Without a GPU the same kernels run in Triton's interpreter, slowly, to be tested there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import linecache
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines import passes
from lightning_optim.engines.kernels import Kernel, KernelBackend
from lightning_optim.engines.launch import Launch
from lightning_optim.engines.step import LocalParameter, Step
from lightning_optim.engines.triton import printer
from lightning_optim.language.program import Program
from lightning_optim.storage.format import Format

name = "triton"

WARPS = 4
# The bound on registers lets three programs run on a processor; without one the assembler spills a register or two to
# fit one more. Normal numbers are made in float64, which takes more: two programs.
REGISTERS, REGISTERS_WITH_NORMALS = 168, 255


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why this engine cannot serve, in one sentence; empty where it can."""
    if not _installed():
        return "triton is not installed."
    if not all(program.elementwise for program in programs):
        return "the update needs means along an axis of the whole tensor."
    if len({p.device for p in params}) > 1:
        return "the parameters are on several devices."
    if any(p.device.type != "cuda" for p in params) and not _interpreted():
        return "a parameter is not on a GPU (TRITON_INTERPRET=1, set before triton is imported, runs it on the CPU)."
    # A complex number is a pair of float32 to an engine.
    unserved = next((p.dtype for p in params if p.dtype not in (*printer.TYPES, torch.complex64)), None)
    return f"it computes in float32, and a parameter is {str(unserved).removeprefix('torch.')}." if unserved else ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(step: Step) -> None:
    """Run a step with one kernel per launch, and one or two more for each level of reductions."""
    device = step.params[0].param.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        passes.run(step, BACKEND)


class _Backend(KernelBackend):
    """Triton, as plans see it."""

    name = name
    served = tuple(printer.TYPES)
    by_alignment = True
    tile = printer.TILE
    print = staticmethod(printer.print_pass)
    print_reduction = staticmethod(printer.print_reduction)

    def build(self, kernel: Kernel) -> Any:
        return load(kernel.name, kernel.text, kernel.formats)

    def call(self, kernel: Kernel, built: Any, launch: Launch, given: dict[str, Any]) -> None:
        books = {form.codebook.name: form.codebook for form in kernel.formats if form.codebook}
        for word in books.keys() & kernel.arguments.keys():
            given[word] = books[word].values(launch.table.device)
        if kernel.values:
            given["values"] = given["values"].float()
        run_kernel(built, launch.count, launch.table, launch.tiles, **given, **options(kernel))

    def combine(self, kernel: Kernel, partials: Tensor, launch: Launch) -> Tensor:
        result = partials.new_empty(len(launch.params), kernel.sums)
        constants = {"WIDTH": launch.signature.width, "COUNT": kernel.sums, "MAXIMUM": kernel.by == "max"}
        function = _functions()["combine_tiles"]
        run_kernel(function, result.numel(), partials, launch.table, result, **constants, **options(kernel))
        return result


BACKEND = _Backend()


@functools.cache
def load(name: str, text: str, formats: tuple[Format, ...]) -> Any:
    """The Triton function of this name in a text. Programs with the same text share it."""
    file = f"<lightning_optim {name} {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)  # where Triton and tracebacks read it
    scope: dict[str, Any] = {**_functions(), "__name__": f"lightning_optim.printed.{name}"}
    for form in formats:
        scope.update({word: value for word, value in form.triton().items() if not word.startswith("__")})
    exec(compile(text, file, "exec"), scope)  # the text is made from our own symbols only
    return scope[name]


@functools.cache
def _functions() -> dict[str, Any]:
    """What all printed kernels may call, by name."""
    from lightning_optim.engines.triton import functions, normals
    from lightning_optim.storage import triton as shared

    modules = (functions, normals, shared)
    return {word: value for module in modules for word, value in vars(module).items() if not word.startswith("__")}


def options(kernel: Kernel) -> dict[str, Any]:
    """What the compiler is told of a kernel.

    Multiplications and additions stay apart, as in torch, so that the numbers are the same.
    """
    registers = REGISTERS_WITH_NORMALS if kernel.integers else REGISTERS
    return {"num_warps": WARPS, "maxnreg": registers, "enable_fp_fusion": False}


def run_kernel(function: Any, count: int, *args: Any, **given: Any) -> None:
    """Run a number of instances of a kernel."""
    function[(count,)](*args, **given)


def source(program: Program, params: Sequence[LocalParameter]) -> str:
    """The text of the kernels that serve a program on local parameters like these, to be read."""
    return "\n\n".join(kernel.text for kernel in BACKEND.kernels(program, params))
