"""Looks at many tensors in one call of C++, for steps that would last as long as their Python.

To ask a tensor for its address from Python takes longer than to update ten elements, and a step asks each parameter,
gradient and slot whether it was replaced, moved or turned. The C++ (`native.cpp`) includes header files of torch, which
takes a compiler ten seconds, once on a machine. So a process that has looked at many tensors compiles it in the
background, and later ones load it in their first step. Until then, and where it cannot be compiled, Python looks and
finds the same.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import sys
import sysconfig
import threading
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.cpp import compiler
from lightning_optim.engines.cpp.dynamic_library import loaded
from lightning_optim.errors import EngineError

PATIENCE = 100_000  # tensors that a process looks at before the C++ is compiled
SECONDS = 600  # for the compiler, which gets what training leaves of the processor
SAME, MOVED = 0, 1

_looked = 0  # tensors; below zero when there is nothing more to wait for
_native: Native | None = None

Numbers = ctypes.Array[ctypes.c_int64]  # and no tensor, which a mode of torch could replace by one without memory


def numbers(count: int, values: Sequence[int] = ()) -> Numbers:
    """An array of so many numbers: the given values, then zeros."""
    return (ctypes.c_int64 * count)(*values)


class Native:
    """The functions of `native.cpp`.

    Args:
        library: The loaded library.
    """

    def __init__(self, library: ctypes.PyDLL) -> None:
        anything, pointer, whole = ctypes.py_object, ctypes.c_void_p, ctypes.c_int64
        self._describe, self._look, self._holds = library.describe, library.look, library.holds
        self._describe.argtypes = (anything, pointer)
        self._look.argtypes = (anything, ctypes.c_int, pointer, pointer, pointer)
        self._holds.argtypes = (anything,) * 4
        for function in (self._describe, self._look, self._holds):
            function.restype = whole

    def describe(self, tensors: list[Tensor]) -> Numbers | None:
        """The facts of tensors: dtypes, devices, sizes, strides and what torch's dispatcher sees, one after another.

        Returns:
            The facts; None where a tensor has no strides.
        """
        count = self._describe(tensors, None)
        if count < 0:
            return None
        facts = numbers(count)
        self._describe(tensors, facts)
        return facts

    def look(self, tensors: list[Tensor], of_gradients: bool, facts: Numbers, before: Numbers, now: Numbers) -> int:
        """Compare tensors with as many others.

        Args:
            tensors: The tensors.
            of_gradients: Look at the gradients of `tensors` instead.
            facts: The facts of the others.
            before: The addresses of the others.
            now: Receives the addresses of the tensors.

        Returns:
            `SAME`, `MOVED` where only addresses differ, or another number where more does or cannot be told.
        """
        return self._look(tensors, of_gradients, facts, before, now)  # type: ignore[no-any-return]

    def holds(self, state: Any, keys: list[Any], states: list[Any], values: list[Any]) -> bool:
        """Whether a dict of dicts has the same keys, the same dicts, and in them the same values, in the same order."""
        return self._holds(state, keys, states, values) == SAME  # type: ignore[no-any-return]


def _begin_anew() -> None:
    """A child of a fork has no thread that compiles."""
    global _looked
    _looked = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def native() -> Native | None:
    """The functions, or None as long as they are not there."""
    return _native


def count(tensors: int) -> None:
    """Count the tensors at which a step has looked.

    The first step loads the C++ where it is stored. Where it is not, many tensors start the compiler in the background.
    """
    global _looked, _native
    if _looked < 0 or _native is not None:
        return
    if _looked == 0:
        with contextlib.suppress(EngineError):
            _native = compiler.stored(_source())
    _looked += tensors
    if _looked >= PATIENCE and _native is None:
        _looked = -1
        thread = threading.Thread(target=_load_quietly, name="lightning_optim native", daemon=True)
        with contextlib.suppress(RuntimeError):  # a system, or a process that ends, may refuse a thread
            thread.start()
            atexit.register(_stop, thread)


def load() -> Native:
    """The functions, compiled at once where they are not there.

    Raises:
        EngineError: where they cannot be compiled.
    """
    global _native
    if _native is None:
        _native = compiler.load(_source())
    assert _native is not None
    return _native


def _load_quietly() -> None:
    try:
        load()
    except EngineError as error:  # what it would do, Python does
        logging.getLogger(__name__).info("Python looks at each tensor of a step, since %s", error)


def _stop(thread: threading.Thread) -> None:
    """Let nothing go on when the process ends."""
    if thread.is_alive():
        compiler.stop("the process ends.")
        thread.join(5)


def _open(library: bytes) -> Native:
    try:
        return Native(loaded(library, ctypes.PyDLL))  # type: ignore[arg-type]
    except AttributeError as error:
        raise EngineError(f"a compiled library cannot be used: {error}.") from error


@functools.cache
def _source() -> compiler.Source:
    """The source, which is compiled anew for another Python or torch.

    Raises:
        EngineError: on Windows, for a Python without the lock under which it reads lists and dicts, and where the
            source is missing.
    """
    if os.name != "posix":
        raise EngineError(compiler.NO_SYSTEM)
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise EngineError("this Python has no global lock.")
    try:
        text = resources.files("lightning_optim.engines").joinpath("native.cpp").read_text()
    except OSError as error:  # a bundle may have left it out
        raise EngineError(f"its source cannot be read: {error}.") from error
    about = f"// Python {sys.version}, torch {torch.__version__} {torch.version.git_version}".replace("\n", " ")
    root, python = os.path.dirname(torch.__file__), sysconfig.get_paths()
    folders = [f"{root}/include", f"{root}/include/torch/csrc/api/include", python["include"], python["platinclude"]]
    libraries = [f"-L{root}/lib", *(f"-l{name}" for name in ("torch_python", "torch_cpu", "c10"))]
    flags = (
        *(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-std=c++20", "-O1", "-DNDEBUG"),
        *(f"-I{folder}" for folder in folders),
        *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else libraries),
    )
    return compiler.Source(f"{about}\n{text}", flags, SECONDS, _open)
