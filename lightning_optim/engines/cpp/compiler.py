"""Compiles printed kernels, and other C++, with the compiler of the machine; keeps them in the user's cache folder.

A kernel gets its name in the cache only when it is whole and on the disk, and it is checked when it is read. Of several
processes that need the same kernel one compiles it and the others wait for it. Where nothing can be stored, kernels are
compiled in a temporary folder that is gone afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_optim.engines.cpp import folders
from lightning_optim.engines.cpp.dynamic_library import function_of
from lightning_optim.engines.cpp.folders import KERNEL, Folder
from lightning_optim.errors import EngineError

# No -ffast-math: results equal those of torch. Products and sums are not contracted, roots set no errno, nothing traps.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-fno-strict-aliasing", "-w"),
)
SECONDS, SECONDS_OF_PROBE = 120, 30  # within which a compiler must end
NO_SYSTEM = "kernels are compiled on Linux and macOS only."
NO_COMPILER = "no C++ compiler is found (c++, g++ or clang++; or set CXX)."


@dataclass(frozen=True)
class Source:
    """C++ source, and what becomes of it.

    Attributes:
        text: The source.
        flags: Flags of the compiler that follow `FLAGS`.
        seconds: Within which it must be compiled; None for those of a kernel.
        open: A function that returns what is wanted of the library, given its bytes.
    """

    text: str
    flags: tuple[str, ...] = ()
    seconds: int | None = None
    open: Callable[[bytes], Any] = function_of


PROBE = Source('extern "C" void run() {}\n')

_found: dict[str, Any] = {}  # by key: what was wanted of the library, or why there is none
_locks: dict[str, threading.Lock] = {}
_running: set[subprocess.Popen[bytes]] = set()
_stopped = threading.Event()  # nobody waits for another process any more
_hung: list[str] = []  # why no kernel is compiled in this process any more
# A thread that does not exist in the child may hold a lock there.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)


@functools.cache
def without_compiler() -> str:
    """Why no kernel can be compiled, in one sentence; empty where it can."""
    if os.name != "posix":
        return NO_SYSTEM
    try:
        load(PROBE)
    except EngineError as error:
        if _compiler():
            warnings.warn(f"the engine 'compiled' cannot serve: {error}", stacklevel=2)
        return str(error)
    return ""


def load(source: Source) -> Any:
    """What is wanted of the library of some C++ source, from the cache folder or compiled into it.

    Raises:
        EngineError: where it is not in the cache and cannot be compiled. The reason stays for this process.
    """
    key = _key(source)
    with _locks.setdefault(key, threading.Lock()):
        if key not in _found:
            try:
                _found[key] = _loaded(source, key)
            except EngineError as error:
                _found[key] = str(error)
        found = _found[key]
    if isinstance(found, str):
        raise EngineError(found)
    return found


def stored(source: Source) -> Any:
    """What is wanted of the library of some C++ source; None where it is not in the cache folder."""
    with folders.cache() as cache:
        return None if cache is None else _stored(cache, source, _key(source))


def forget() -> None:
    """Forget kernels and failures, so that a test starts as a new process does."""
    _found.clear()
    _hung.clear()
    _compiler.cache_clear()
    without_compiler.cache_clear()


def stop(reason: str) -> None:
    """End the compilers that run, and start none any more in this process.

    Args:
        reason: A sentence that says why.
    """
    _stopped.set()
    _hung.append(f"nothing is compiled any more, since {reason}")
    for process in [*_running]:
        _end(process)


def _loaded(source: Source, key: str) -> Any:
    with folders.cache() as cache:
        if cache is None:
            return _compiled(source, key, None)
        if found := _stored(cache, source, key):
            return found
        with folders.lock(cache, key, _limit(source), _stopped.is_set) as locked:
            if found := _stored(cache, source, key):  # by the process that held the lock
                return found
            cache.sweep(key if locked else "")
            return _compiled(source, key, cache)


# ------------------------------------------------------------------ what is stored


def _key(source: Source) -> str:
    """The name of a kernel: what its code depends on. The compiler is left out: a machine without one may use it."""
    return hashlib.sha256("\0".join((source.text, *FLAGS, *source.flags, _processor())).encode()).hexdigest()[:32]


def _seal(key: str, library: bytes) -> bytes:
    """What follows the library in its file: the loader ignores it, and it tells whether the file is whole."""
    return b"\nlightning_optim " + hashlib.sha256(key.encode() + library).hexdigest().encode()


def _stored(cache: Folder, source: Source, key: str) -> Any:
    """What is wanted of a library in the cache; None where it is missing, damaged, another's or not loadable."""
    length = len(_seal(key, b""))
    contents = cache.read(key + KERNEL) or b""
    library, seal = contents[:-length], contents[-length:]
    if seal != _seal(key, library):
        return None
    try:
        found = source.open(library)
    except EngineError:  # made with another C library, for example
        return None
    cache.touch(key + KERNEL)
    return found


@functools.cache
def _processor() -> str:
    """The processor, on which `-march=native` depends, and the C library: machines may share a cache folder."""
    words = ("model name", "flags", "Features", "features", "CPU ", "cpu\t", "isa", "machine", "processor ")
    lines: set[str] = set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        lines = {line for line in text.splitlines() if line.startswith(words)}
    named = sorted(lines) or [platform.processor(), platform.node()]
    return "\n".join([platform.machine(), str(sys.maxsize), getattr(sys.implementation, "_multiarch", ""), *named])


# ------------------------------------------------------------------ the compiler


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The command of the compiler; empty where none is found."""
    with contextlib.suppress(ValueError):  # of quotation marks that are not closed
        named = shlex.split(os.environ.get("CXX", ""))
        if named and (path := shutil.which(named[0])):  # CXX may be "ccache g++"
            return (os.path.abspath(path), *named[1:])
    return next(((path,) for word in ("c++", "g++", "clang++") if (path := shutil.which(word))), ())


def _limit(source: Source) -> int:
    """The seconds within which some source must be compiled."""
    return source.seconds or (SECONDS_OF_PROBE if source == PROBE else SECONDS)


def _compiled(source: Source, key: str, cache: Folder | None) -> Any:
    """Compile some source where there is room for it, and store it if that is the cache.

    Raises:
        EngineError: where that fails in each folder.
    """
    if not _compiler():
        raise EngineError(NO_COMPILER)
    reason = "there is no folder for temporary files."
    for parent in (*((cache,) if cache else ()), *folders.temporary()):
        if _hung:
            raise EngineError(_hung[0])
        try:
            with folders.work(parent, key) as folder:
                library = _output(source, folder)
                found = source.open(library)
                if isinstance(parent, Folder):
                    _store(parent, folder, key, library)
                return found
        except OSError as error:
            reason = f"a kernel cannot be compiled: {error.strerror or error}."
        except EngineError as error:
            reason = str(error)
    raise EngineError(reason)


def _store(cache: Folder, folder: Folder, key: str, library: bytes) -> None:
    """Store a kernel. It serves this process also where there is no room for it."""
    with contextlib.suppress(OSError):
        folder.write("kernel", library + _seal(key, library), to_disk=True)
        folder.move("kernel", cache, key + KERNEL)


def _output(source: Source, folder: Folder) -> bytes:
    """What the compiler makes of some source.

    All names are relative to the folder: a compiler need not understand its path, nor find it again.

    Raises:
        EngineError: where the compiler fails, or does not end in time.
        OSError: where it cannot be started, or nothing can be written.
    """
    folder.write("kernel.cpp", source.text.encode())
    folder.write("messages", b"")
    with open(os.open("messages", os.O_RDWR | os.O_CLOEXEC, dir_fd=folder.descriptor), "r+b") as messages:
        # Messages go to a file: a server that the compiler starts, as sccache does, would hold a pipe open.
        process = subprocess.Popen(
            [*_compiler(), *FLAGS, "kernel.cpp", "-o", "kernel.so", *source.flags],
            cwd=folder.where,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            start_new_session=True,
            env={**os.environ, "TMPDIR": "."},
        )
        name = folders.printable(_compiler()[0])
        _running.add(process)
        try:
            status = process.wait(_limit(source))
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            _hung.append(f"the C++ compiler {name} does not work: it has not ended after {_limit(source)} seconds.")
            raise EngineError(_hung[0]) from None
        finally:
            _running.discard(process)
        messages.seek(0)
        said = messages.read(10_000).decode(errors="backslashreplace").strip()
    if status:
        said = said.splitlines()[0] + "." if said else f"it ends with status {status} and says nothing."
        raise EngineError(f"the C++ compiler {name} does not work: {said}")
    with contextlib.suppress(FileNotFoundError):
        os.chmod("kernel.so", 0o600, dir_fd=folder.descriptor)  # others may write what is made under umask 0
    library = folder.read("kernel.so")
    if not library:
        raise EngineError(f"the C++ compiler {name} does not work: it writes nothing.")
    return library


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a compiler with all processes that it has started."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
