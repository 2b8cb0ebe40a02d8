"""The engine for GPUs: one launch for all tensors of a batch, of a kernel that is printed from the update.

The arithmetic is that of the reference, operation by operation in float32, and a parameter is rounded once. Floats
enter as arguments, so a schedule compiles nothing. How launches follow each other stands in `passes.py`.

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
from lightning_optim.engines.launch import Table
from lightning_optim.engines.passes import Text
from lightning_optim.engines.step import LocalParameter, Step
from lightning_optim.engines.triton.printer import TILE, reduce_text, write_text
from lightning_optim.language.program import Program
from lightning_optim.storage.dynamic import codebook

name = "triton"

SERVED = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
# The bound on registers lets three programs run on a processor; without one the assembler spills a register or two to
# fit one more. Normal numbers are made in float64, which takes more: two programs.
REGISTERS, REGISTERS_OF_DRAWS = 168, 255


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
    unserved = next((p.dtype for p in params if p.dtype not in (*SERVED, torch.complex64)), None)
    return f"it computes in float32, and a parameter is {str(unserved).removeprefix('torch.')}." if unserved else ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(step: Step) -> None:
    """Run a step with one launch per batch, and one or two more for each level of reductions."""
    device = step.params[0].param.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        passes.run(step, BACKEND)


class _Backend:
    """Triton, as `passes` sees it."""

    name = name
    served = SERVED
    by_alignment = True
    tile = TILE
    write_text = staticmethod(write_text)
    reduce_text = staticmethod(reduce_text)

    def build(self, text: Text) -> Any:
        return compiled(text.name, text.text)

    def launch(self, text: Text, kernel: Any, table: Table, given: dict[str, Any]) -> None:
        for word in {"signed_codebook", "unsigned_codebook"} & text.arguments.keys():
            given[word] = codebook(word == "signed_codebook", table.rows.device)
        if text.values:
            given["values"] = given["values"].float()
        launch(kernel, table.count, table.rows, table.blocks, **given, **options(text))

    def combine(self, text: Text, partials: Tensor, table: Table) -> Tensor:
        result = partials.new_empty(len(table.rows) - 1, text.sums)
        constants = {"WIDTH": table.rows.shape[1], "COUNT": text.sums, "MAXIMUM": text.by == "max"}
        launch(_codes().combine_blocks, result.numel(), partials, table.rows, result, **constants, **options(text))
        return result


BACKEND = _Backend()


@functools.cache
def compiled(name: str, text: str) -> Any:
    """The Triton function of this name in a text. Programs with the same text share it."""
    import triton
    import triton.language as tl

    file = f"<lightning_optim {name} {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)  # where Triton and tracebacks read it
    device_functions = {word: value for word, value in vars(_codes()).items() if not word.startswith("__")}
    scope = {**device_functions, "triton": triton, "tl": tl, "__name__": f"lightning_optim.printed.{name}"}
    exec(compile(text, file, "exec"), scope)  # the text is made from our own symbols only
    return scope[name]


def _codes() -> Any:
    from lightning_optim.engines.triton import functions

    return functions


def options(text: Text) -> dict[str, Any]:
    """What the compiler is told of a kernel.

    Multiplications and additions stay apart, as in torch, so that the numbers are the same.
    """
    registers = REGISTERS_OF_DRAWS if text.integers else REGISTERS
    return {"num_warps": WARPS, "maxnreg": registers, "enable_fp_fusion": False}


def launch(function: Any, count: int, *args: Any, **given: Any) -> None:
    """Run a kernel."""
    function[(count,)](*args, **given)


def texts(program: Program, rows: Sequence[LocalParameter]) -> list[Text]:
    """The kernels that serve a program on tensors like these, in the order of their launches."""
    return passes.texts(BACKEND, program, rows)


def source(program: Program, rows: Sequence[LocalParameter]) -> str:
    """The text of these kernels, to be read."""
    return "\n\n".join(text.text for text in texts(program, rows))
