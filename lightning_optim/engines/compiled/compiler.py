"""Compiles printed kernels with the C++ compiler of the machine, and stores them in the user's cache folder."""

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
from collections.abc import Callable
from pathlib import Path

# No -ffast-math: results equal those of torch. Products and sums are not contracted, roots set no errno, nothing traps.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-fno-strict-aliasing", "-w"),
)


@functools.cache
def without_compiler() -> str:
    """Why no compiler can be used, in one sentence; empty where one works."""
    if not _compiler():
        return "no C++ compiler is found (c++, g++ or clang++; or set CXX)."
    try:
        load('extern "C" void run() {}\n')
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler {_compiler()} does not work: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    """The first line of what the compiler or the loader printed."""
    words = getattr(error, "stderr", "") or str(error)
    return words.strip().splitlines()[0] + "." if words.strip() else "it says nothing."


@functools.cache
def _compiler() -> str | None:
    return next(
        (found for word in (os.environ.get("CXX"), "c++", "g++", "clang++") if word and (found := shutil.which(word))),
        None,
    )


@functools.cache
def load(text: str) -> Callable[..., None]:
    """The function `run` of some C++ source, from the cache folder or compiled into it.

    Raises:
        subprocess.CalledProcessError: where the compiler refuses the source.
    """
    key = hashlib.sha256("\0".join((text, *FLAGS, _compiler() or "", _processor())).encode()).hexdigest()
    library = _folder() / f"{key[:32]}.so"
    if not library.exists():
        _compile(text, library)
    function = ctypes.CDLL(str(library)).run
    function.restype = None
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, pointer, pointer, whole, whole, pointer, pointer, whole, pointer)
    return function


def _compile(text: str, library: Path) -> None:
    """Compile in a folder beside the library and move it: another process may compile or load it at the same time."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        file, compiled = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        file.write_text(text)
        command = [str(_compiler()), *FLAGS, str(file), "-o", str(compiled)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        compiled.replace(library)


@functools.cache
def _processor() -> str:
    """The processor, on which `-march=native` depends: machines may share a cache folder."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


@functools.cache
def _folder() -> Path:
    """The cache folder. It must belong to this user, since its libraries are loaded without further checks."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home, "lightning_optim")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lightning_optim_"))
