"""The fastest engine for CPUs, where there is a C++ compiler: the update as one loop, compiled once for a machine.

The text is printed from the graph (`printer.py`), compiled in a few tenths of a second, and kept in the user's
cache folder, so later processes only load it. It depends on the optimizer's flags and on types alone: no shape, no
learning rate and no number of tensors compiles anything. Without a compiler the blocked engine serves.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines import passes
from lightning_optim.engines.compiled.printer import TILE, reduce_text, write_text
from lightning_optim.engines.launch import Table
from lightning_optim.engines.passes import Text
from lightning_optim.engines.step import Step
from lightning_optim.language.program import Program
from lightning_optim.storage.dynamic import codebook, first_of_each_code

name = "compiled"

SERVED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# No -ffast-math: numbers are those of torch. Products and sums stay apart, roots set no errno, nothing traps.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-fno-strict-aliasing", "-w"),
)
CELLS, NEAREST_CELL = 2945, 13312  # as in functions.h
THREADED = 32  # blocks of the table from which on threads are worth their start


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why this engine cannot serve, in one sentence; empty where it can."""
    if not all(program.elementwise for program in programs):
        return "the update needs means along an axis of the whole tensor."
    if any(p.device.type != "cpu" for p in params):
        return "a parameter is not on the CPU."
    return without_compiler()


def run(step: Step) -> None:
    """Run a step with one call per batch, and one or two more for each level of reductions."""
    passes.run(step, BACKEND)


class _Backend:
    """A C++ compiler, as `passes` sees it."""

    name = name
    served = SERVED
    by_alignment = False
    tile = TILE
    write_text = staticmethod(write_text)
    reduce_text = staticmethod(reduce_text)

    def build(self, text: Text) -> Callable[..., None]:
        return compiled(text.text)

    def launch(self, text: Text, kernel: Callable[..., None], table: Table, given: dict[str, Any]) -> None:
        numbers = (ctypes.c_double * max(len(text.numbers), 1))(*(given[word] for word in text.numbers))
        values = given.get("values")
        partials = given.get("partials")
        codebooks = [
            searchable_codebook(word == "signed_codebook").data_ptr() if word in text.arguments else None
            for word in ("signed_codebook", "unsigned_codebook")
        ]

        def part(first: int, last: int) -> None:
            kernel(
                *(table.rows.data_ptr(), table.blocks.data_ptr(), first, last, numbers),
                *(None if x is None else x.data_ptr() for x in (values,)),
                given.get("t", 0),
                None if partials is None else partials.data_ptr(),
                *codebooks,
            )

        threads = torch.get_num_threads()
        if threads == 1 or table.count < THREADED:
            part(0, table.count)
            return
        bounds = [table.count * i // threads for i in range(threads + 1)]
        list(_pool(threads).map(part, bounds[:-1], bounds[1:]))

    def combine(self, text: Text, partials: Tensor, table: Table) -> Tensor:
        """Block after block, so that the order is always the same."""
        shape = (len(table.rows) - 1, text.sums)
        if text.by == "sum":
            return partials.new_zeros(shape).index_add_(0, table.blocks, partials)
        of = table.blocks.long()[:, None].expand_as(partials)
        return partials.new_full(shape, -torch.inf).scatter_reduce_(0, of, partials, "amax")


BACKEND = _Backend()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "lightning_optim")


@functools.cache
def searchable_codebook(signed: bool) -> Tensor:
    """The codebook of the dynamic code, and behind it what finds codes without a search: float32 and int32 in a row.

    Numbers that share their exponent and the seven bits behind it are a cell, so narrow that at most one code begins in
    it. For each cell from 2^-23 to 1, and then for those of negative numbers: how many codes begin before it, and the
    number from which on one more does. Smaller numbers fall into the first cell, which is that of zero.
    """
    begins = first_of_each_code(signed)
    edges = ((torch.arange(CELLS + 1, dtype=torch.int32) + NEAREST_CELL) << 16).view(torch.float32)
    edges[0] = 0.0
    low = torch.cat([edges[:-1], -edges[1:].nextafter(torch.tensor(0.0))])  # the least number of each cell
    below = torch.searchsorted(begins, low, right=True)
    following = torch.cat([begins, torch.tensor([torch.inf])])[below]
    return torch.cat([codebook(signed, torch.device("cpu")), below.int().view(torch.float32), following])


# ---------------------------------------------------------------------------------------------- the compiler


@functools.cache
def without_compiler() -> str:
    """Why there is no compiler to be used, in one sentence; empty where there is one that works."""
    if not _compiler():
        return "no C++ compiler is found (c++, g++ or clang++; or set CXX)."
    try:
        compiled('extern "C" void run() {}\n')
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler {_compiler()} does not work: {_said(error)}"
    return ""


def _said(error: Exception) -> str:
    words = getattr(error, "stderr", "") or str(error)
    return words.strip().splitlines()[0] + "." if words.strip() else "it says nothing."


@functools.cache
def _compiler() -> str | None:
    return next(
        (found for word in (os.environ.get("CXX"), "c++", "g++", "clang++") if word and (found := shutil.which(word))),
        None,
    )


@functools.cache
def compiled(text: str) -> Callable[..., None]:
    """The function `run` of a text, from the cache folder or compiled into it.

    Raises:
        subprocess.CalledProcessError: where the compiler refuses the text.
    """
    source = f"{_codes()}\n{text}"
    key = hashlib.sha256("\0".join((source, *FLAGS, _compiler() or "", _processor())).encode()).hexdigest()
    library = _folder() / f"{key[:32]}.so"
    if not library.exists():
        _compile(source, library)
    function = ctypes.CDLL(str(library)).run
    function.restype = None
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, pointer, whole, whole, pointer, pointer, whole, pointer, pointer, pointer)
    return function


def _compile(source: str, library: Path) -> None:
    """Compile beside the place and move there: another process may do the same, or be loading it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        file, made = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        file.write_text(source)
        command = [str(_compiler()), *FLAGS, str(file), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.replace(library)


@functools.cache
def _codes() -> str:
    return resources.files("lightning_optim.engines.compiled").joinpath("functions.h").read_text()


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared between machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


@functools.cache
def _folder() -> Path:
    """Where compiled kernels are kept: of this user alone, since they are loaded as they are."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home, "lightning_optim")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lightning_optim_"))
