"""Processes that start as a new one does, for tests of what processes share: first steps with a cache of kernels.

A process is a fork of the test's, which has torch already, and begins without kernels, folders or warnings of its own.
"""

from __future__ import annotations

import functools
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_optim import AdamW, engines
from lightning_optim.engines import compiled
from lightning_optim.engines.cpp import compiler, folders

NOBODY = 65534
# Passes through to the compiler. It keeps what that makes, so that the tests compile each kernel once.
COMPILER = """#!/bin/sh
echo run >> "{count}"
{before}
kept="{store}/$(cat kernel.cpp | sha256sum | cut -c 1-32)"
[ -f "$kept" ] || {{ c++ "$@" && cp kernel.so "$kept.$$" && mv "$kept.$$" "$kept"; }}
cp "$kept" kernel.so
{after}
"""


class Step(NamedTuple):
    """What came of a first step."""

    engine: str
    weight: float
    steps: float
    warnings: list[str]


WHOLE = 1 - 0.01 * 0.001 - 0.001  # of the weight 1 after a step of AdamW


def first_step(engine: str = "auto") -> Step:
    """One step of a new optimizer, and the engine that its `repr` names."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        p = torch.nn.Parameter(torch.ones(9))
        p.grad = torch.ones(9)
        optimizer = AdamW([p], engine=engine)
        optimizer.step()
        named = next(line for line in repr(optimizer).splitlines() if "engine:" in line)
    words = [str(warning.message) for warning in told]
    return Step(named.split("engine:")[1].strip(), p[0].item(), float(optimizer.state[p]["step"]), words)


class Process:
    """A child that runs a function.

    Args:
        function: What it runs. It returns something that can be pickled.
        environ: Variables of the environment; None removes one.
        user: The user that it runs as, if this one may choose.
        largest: The largest file that it can write, as if the disk were full then.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        environ: dict[str, str | None],
        user: int | None = None,
        largest: int | None = None,
    ) -> None:
        self.reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads, of which the child needs none
            self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        try:
            os.close(self.reader)
            os.setpgid(0, 0)
            found: Any = _in_child(function, environ, user, largest)
        except BaseException as error:
            found = error if isinstance(error, Exception) else RuntimeError(repr(error))
            if os.environ.get("TRACE"):
                traceback.print_exc()
        try:
            with open(writer, "wb") as file:
                file.write(pickle.dumps(found))
        finally:
            os._exit(0)

    def result(self) -> Any:
        """What the function returned.

        Raises:
            Exception: what it raised.
            ChildProcessError: where a signal ended the process.
        """
        watch = threading.Timer(180, os.killpg, (self.pid, signal.SIGKILL))  # seconds on a quiet machine
        watch.start()
        try:
            with open(self.reader, "rb") as file:
                said = file.read()
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        finally:
            watch.cancel()
        if status < 0:
            raise ChildProcessError(signal.Signals(-status).name)
        found = pickle.loads(said)
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self, by: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal, and wait for the end of the process if it is one that ends it."""
        os.kill(self.pid, by)
        if by == signal.SIGKILL:
            os.waitpid(self.pid, 0)
            os.close(self.reader)


def _in_child(
    function: Callable[[], Any], environ: dict[str, str | None], user: int | None, largest: int | None
) -> Any:
    for name, value in environ.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    compiler.forget()
    for told in (engines._told, folders._told):
        told.clear()
    tempfile.tempdir = None
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if user is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.stdout.flush()
    return function()


@functools.cache
def _import_all() -> None:
    """What torch imports in a first step takes seconds and leaves a folder of its own. Another user may not read it."""
    for engine in ("reference", "blocked"):
        p = torch.nn.Parameter(torch.ones(9))
        p.grad = torch.ones(9)
        AdamW([p], engine=engine).step()
    compiled._file("functions.h")


@dataclass
class Machine:
    """A machine with a compiler, a home and folders for temporary files of its own, below a folder."""

    root: Path
    store: Path
    environ: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _import_all()
        for folder in (self.cache.parent, self.temporary):
            folder.mkdir(mode=0o777, parents=True, exist_ok=True)
            folder.chmod(0o777)
        self.set_compiler()
        self.environ |= {"XDG_CACHE_HOME": str(self.cache.parent), "TMPDIR": str(self.temporary)}

    @property
    def cache(self) -> Path:
        return self.root / "home" / "lightning_optim"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    @property
    def kernels(self) -> list[Path]:
        """The kernels in the cache: that of the step is larger than that of the probe."""
        return sorted(self.cache.glob("*.so"), key=lambda file: file.stat().st_size)

    @property
    def compilations(self) -> int:
        """How often the compiler was called."""
        count = self.root / "count"
        return len(count.read_text().splitlines()) if count.exists() else 0

    def set_compiler(self, before: str = "", after: str = "", name: str = "c++") -> None:
        """Set what the compiler does before and after it compiles, in the language of the shell."""
        script = self.root / name
        count = self.root / "count"
        count.touch()
        count.chmod(0o666)
        script.write_bytes(os.fsencode(COMPILER.format(count=count, store=self.store, before=before, after=after)))
        script.chmod(0o755)
        self.environ["CXX"] = str(script)

    def start(self, function: Callable[[], Any] = first_step, **options: Any) -> Process:
        return Process(function, self.environ, **options)

    def run(self, function: Callable[[], Any] = first_step, **options: Any) -> Any:
        """What a function gives in a new process."""
        return self.start(function, **options).result()

    def litter(self) -> list[str]:
        """What lies in the cache and in the folder for temporary files besides kernels."""
        found = [*self.temporary.iterdir(), *(self.cache.iterdir() if self.cache.is_dir() else ())]
        return [str(path) for path in found if path.suffix != ".so"]
