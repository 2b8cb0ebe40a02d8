"""Run a function on several ranks of this machine, and say which rank is at fault when that fails.

Ranks are forked from a server that has imported torch, Lightning and the package and has run nothing yet. So a job
costs a fraction of a second, not an import per rank, and no rank inherits a thread pool that the fork left dead.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from lightning_optim.engines import native

T = TypeVar("T")

GRACE = 2.0  # seconds that the other ranks get after the first failure, to say what they saw of it

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "lightning.pytorch",
        "lightning_optim.callbacks",
        "pytest",
        "tests.harness.runs",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
    ]
)

_GLOO = re.compile(r"ProcessGroupGloo::runLoop|gloo::transport::\w+::Loop::run")  # what its threads run
_LOST_PEER, _HUNG, _FAULT = range(3)  # guilt: the ranks with the most of it are blamed
_LOST_PEER_WORDS = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|timed out waiting|failed to recv",
    re.IGNORECASE,
)


class RankFailure(AssertionError):
    """A rank raised, died or hung.

    Attributes:
        causes: What happened to the ranks at fault, by rank, with tracebacks.
        consequences: What the ranks said that only lost a peer, in one line each.
    """

    def __init__(self, causes: Mapping[int, str], consequences: Mapping[int, str]) -> None:
        self.causes = dict(causes)
        self.consequences = dict(consequences)
        lines = [f"rank {rank}: {text}" for rank, text in self.causes.items()]
        lines += [f"rank {rank}, as a consequence: {text}" for rank, text in self.consequences.items()]
        super().__init__("\n".join(lines))


def run_ranks(
    function: Callable[..., T],
    *args: Any,
    world_size: int = 2,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[T]:
    """Call `function(*args, **kwargs)` on every rank, and return what each returned.

    The ranks find `RANK`, `WORLD_SIZE`, `MASTER_PORT` and so on in their environment, as under `torchrun`,
    and form a process group themselves: `Trainer(devices=world_size, accelerator="cpu", strategy=...)` does,
    and so does `init_process_group("gloo")`. A rank that is done waits for the others, so that none loses a
    peer (or the store, which rank 0 holds) to an early exit.

    A thread of gloo may crash by itself (torch 2.13, once in thousands of jobs, inside no call of ours). Such a job is
    repeated once, and its stacks are in a warning. A crash in any other thread is a failure, as is a second one.

    Args:
        function: Something that a module holds by name: no lambda, no inner function.
        args: For the function. Must pickle, as the result must; tensors are copied.
        world_size: Number of ranks.
        timeout: Seconds for the job, from when its processes stand.
        env: Added to the environment of every rank.
        kwargs: For the function.

    Raises:
        RankFailure: A rank raised, died or did not end in time. All ranks are dead then, and their children.
    """
    job = pickle.dumps((function, args, kwargs))
    try:
        return _run(job, world_size, timeout, env or {})
    except RankFailure as failure:
        if not any(map(_in_gloo, failure.causes.values())):
            raise
        warnings.warn(f"A thread of gloo crashed, so the job runs again. {failure}", stacklevel=2)
    return _run(job, world_size, timeout, env or {})


def _run(job: bytes, world_size: int, timeout: float, env: Mapping[str, str]) -> list[Any]:
    """Run a job: a pickled function and its arguments."""
    shared = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        **env,
    }
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                environ = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(_Rank(job, environ, Path(folder, f"stack{rank}"), Path(folder, f"stderr{rank}")))
            endings = _collect(ranks, timeout)
            if any(ending.error for ending in endings):
                raise _failure(endings)
            for one in ranks:
                one.release()
        finally:
            for one in ranks:  # all before any wait, which a second Ctrl-C would cut short
                one.kill()
            for one in ranks:
                one.bury()
            for one in ranks:
                sys.stderr.write(one.said())
    return [ending.result for ending in endings]


class _Ending(NamedTuple):
    """What became of a rank: a result, or an error in one line with the traceback."""

    result: Any = None
    error: str = ""
    stack: str = ""
    guilt: int = _FAULT


class _Rank:
    """A rank as the test sees it: a process, and a pipe on which its ending comes and its release goes."""

    def __init__(self, job: bytes, environ: dict[str, str], stack: Path, stderr: Path) -> None:
        stack.touch()
        stderr.touch()
        self._stack, self._stderr = stack, stderr
        self._pipe, other_end = _CONTEXT.Pipe()
        args = (other_end, job, environ, os.getcwd(), stack, stderr)
        self._process = _CONTEXT.Process(target=_work, args=args)
        self._process.start()  # not a daemon: a DataLoader's workers are children, and daemons have none
        other_end.close()
        assert self._process.pid is not None
        self._pid = self._process.pid

    def signs(self) -> list[Connection[Any, Any] | int]:
        """What to wait for. The pipe alone would not do: children that outlive their rank keep it open."""
        return [self._pipe, self._process.sentinel]

    def ending(self) -> _Ending:
        """What the rank said, or how it died; to be asked after a sign."""
        with suppress(EOFError, ConnectionError):
            if self._pipe.poll():
                message = self._pipe.recv_bytes()
                try:
                    return _Ending(*pickle.loads(message))
                except Exception as error:
                    return _Ending(error=f"its result cannot be unpickled: {error!r}")
        self._process.join(GRACE)
        code = self._process.exitcode
        if code is None or code >= 0:
            return _Ending(error=f"ended without a result, exit code {code}")
        guilt = _LOST_PEER if code == -signal.SIGABRT else _FAULT  # gloo's threads abort when a peer vanishes
        name = signal.Signals(-code).name
        return _Ending(error=f"killed by {name}", stack=self._stack.read_text() + self.said(), guilt=guilt)

    def said(self) -> str:
        """What the rank has written to its standard error; after a fatal signal also the native stacks."""
        return self._stderr.read_text(errors="replace")

    def interrupted(self, why: str) -> _Ending:
        """Where a rank stands that has not ended."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)
            patience, before = time.monotonic() + 2.0, 0  # a stopped process has no answer
            while time.monotonic() < patience:
                time.sleep(0.05)
                if (size := self._stack.stat().st_size) and size == before:  # all of its lines
                    break
                before = size
        return _Ending(error=why, stack=self._stack.read_text(), guilt=_HUNG)

    def release(self) -> None:
        """Let a rank go that has said its result."""
        self._pipe.close()
        self._process.join(GRACE)

    def kill(self) -> None:
        """End the rank, whatever it does, and its children."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        self._process.kill()

    def bury(self) -> None:
        """Forget a rank that has been killed."""
        self._pipe.close()
        self._process.join()


def _collect(ranks: list[_Rank], timeout: float) -> list[_Ending]:
    """Wait until every rank has ended, the time is over, or the grace after a failure."""
    deadline, why = time.monotonic() + timeout, f"still running after {timeout:g} s"
    endings: dict[_Rank, _Ending] = {}
    while running := [rank for rank in ranks if rank not in endings]:
        if (left := deadline - time.monotonic()) <= 0:
            break
        signs = set(wait([sign for rank in running for sign in rank.signs()], left))
        for rank in running:
            if not signs.isdisjoint(rank.signs()):
                endings[rank] = rank.ending()
                if endings[rank].error and deadline > (soon := time.monotonic() + GRACE):
                    deadline, why = soon, f"still running {GRACE:g} s after another rank failed"
    return [endings[rank] if rank in endings else rank.interrupted(why) for rank in ranks]


def _in_gloo(cause: str) -> bool:
    """Whether the thread of a rank that crashed is one of gloo, and not in a kernel of this package."""
    of_threads = re.split(r"SIG[A-Z]+\(\d+\), PID: \d+, Thread \d+:", cause)
    crashed = [stack for stack in of_threads if "FatalSignalHandler::fatalSignalHandler" in stack]
    return bool(crashed) and all(_GLOO.search(stack) and "lightning_optim" not in stack for stack in crashed)


def _failure(endings: list[_Ending]) -> RankFailure:
    """Tell the ranks at fault from those that only noticed."""
    failed = {rank: ending for rank, ending in enumerate(endings) if ending.error}
    most = max(ending.guilt for ending in failed.values())
    return RankFailure(
        {rank: f"{end.error}\n{end.stack}".rstrip() for rank, end in failed.items() if end.guilt == most},
        {rank: end.error for rank, end in failed.items() if end.guilt < most},
    )


def _work(
    pipe: Connection[Any, Any], job: bytes, environ: dict[str, str], folder: str, stack: Path, stderr: Path
) -> None:
    """Be a rank."""
    os.setpgid(0, 0)  # one signal then reaches children as well
    os.environ.clear()  # it was the server's, from when that started
    os.environ.update(environ)
    os.chdir(folder)
    with stack.open("w") as file, stderr.open("w") as said:
        os.dup2(said.fileno(), 2)
        faulthandler.enable(file)
        torch._C._set_print_stack_traces_on_fatal_signal(True)  # of every thread, those that run no Python included
        faulthandler.register(signal.SIGUSR1, file)
        try:
            torch.set_num_threads(1)
            native._looked = -(int(environ["RANK"]) % 2)  # every other rank leaves it to Python to look at tensors
            function, args, kwargs = pickle.loads(job)
            message = pickle.dumps(_Ending(function(*args, **kwargs)))
        except BaseException as error:
            pipe.send_bytes(pickle.dumps(_ending_of(error)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # at once: what peers wait for then fails instead of hanging
        pipe.send_bytes(message)
        with suppress(EOFError, ConnectionError):
            pipe.recv_bytes()  # nothing comes: the release closes the pipe
        faulthandler.disable()
        faulthandler.unregister(signal.SIGUSR1)


def _ending_of(error: BaseException) -> _Ending:
    """The error in one line, all of it, and whether it began with a lost peer."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    return _Ending(
        error=traceback.format_exception_only(error)[-1].strip(),
        stack="".join(traceback.format_exception(error)),
        guilt=_LOST_PEER if _LOST_PEER_WORDS.search(str(first)) else _FAULT,
    )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
