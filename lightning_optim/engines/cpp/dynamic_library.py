"""Loads compiled kernels from their bytes: what is loaded is exactly what was checked.

On Linux the bytes go into a file in memory, which nobody else can write or cut off: neither between check and load,
nor while a kernel runs from it. A folder on a filesystem without execution does not matter then either.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import struct
from collections.abc import Callable

from lightning_optim.engines.cpp import folders
from lightning_optim.errors import EngineError

_loads = itertools.count()


def function_of(library: bytes) -> Callable[..., None]:
    """The function `run` of a compiled kernel.

    Raises:
        EngineError: where the bytes are no whole library, or the system refuses to load them.
    """
    try:
        function = loaded(library).run
    except AttributeError as error:
        raise EngineError(f"a compiled kernel cannot be loaded: {error}.") from error
    function.restype = None
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, pointer, pointer, whole, whole, pointer, pointer, whole, *[pointer] * 3)
    return function


def loaded(library: bytes, kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """A library from its bytes.

    Args:
        library: The bytes.
        kind: How its functions are called: `ctypes.PyDLL` holds the lock of the interpreter meanwhile.

    Raises:
        EngineError: where the bytes are no whole library, or the system refuses to load them.
    """
    if not _is_whole(library):
        raise EngineError("the C++ compiler wrote a file that is no whole library.")
    try:
        return _loaded(library, kind)
    except OSError as error:
        raise EngineError(f"a compiled kernel cannot be loaded: {error}.") from error


def _loaded(library: bytes, kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    """The library from memory, or from a temporary folder where the system has no such files or does not run them."""
    attempts: list[Callable[[bytes], ctypes.CDLL]]
    folder = [functools.partial(_from_folder, parent, kind) for parent in folders.temporary()]
    attempts = [functools.partial(_from_memory, kind), *folder]
    refusals: list[OSError] = []
    for attempt in attempts:
        found = _tried(attempt, library)
        if not isinstance(found, OSError):
            return found
        refusals.append(found)
    raise refusals[0]


def _tried(attempt: Callable[[bytes], ctypes.CDLL], library: bytes) -> ctypes.CDLL | OSError:
    try:
        return attempt(library)
    except OSError as error:
        return error


def _from_folder(parent: str, kind: type[ctypes.CDLL], library: bytes) -> ctypes.CDLL:
    with folders.work(parent, "library") as folder:
        folder.write("kernel.so", library)
        return kind(f"{folder.path}/kernel.so")


def _from_memory(kind: type[ctypes.CDLL], library: bytes) -> ctypes.CDLL:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no files in memory")
    descriptor = os.memfd_create("lightning_optim")
    try:
        rest = memoryview(library)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        # The loader takes a file for one that it has loaded if their names are equal, and descriptors are used again.
        name = "./" * next(_loads)
        return kind(f"/proc/self/fd/{name}{descriptor}")
    finally:
        os.close(descriptor)


def _is_whole(library: bytes) -> bool:
    """Whether all that the system would map lies within the file; touching the rest would end the process."""
    if library[:4] != b"\x7fELF":
        return bool(library)  # another system's format, or rubbish, which the loader refuses
    try:
        wide, order = library[4] == 2, "<" if library[5] == 1 else ">"
        (table,) = struct.unpack_from(order + ("Q" if wide else "I"), library, 32 if wide else 28)
        size, count = struct.unpack_from(order + "HH", library, 54 if wide else 42)
        for at in range(table, table + count * size, size):
            (kind,) = struct.unpack_from(order + "I", library, at)
            layout, begin, length = ("Q", 8, 32) if wide else ("I", 4, 16)
            (first,), (extent,) = (struct.unpack_from(order + layout, library, at + x) for x in (begin, length))
            if kind == 1 and first + extent > len(library):
                return False
    except (struct.error, IndexError, ValueError):
        return False
    return bool(count)
