"""Runs one after another in this process, or some at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lightning_optim.errors import OptionError
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

Run = Callable[[Candidate, int, float], Any]
Tick = Callable[["Task", float], None]
GRACE = 5.0  # seconds that a process has to end by itself


@dataclass(frozen=True, eq=False)
class Task:
    """A run that is to be done."""

    candidate: Candidate
    lr: float
    seed: int


def execute(run: Run, task: Task, tick: Callable[[float], None]) -> Outcome:
    """Do a run. An error is an outcome too; Ctrl-C and a request to exit are not.

    Args:
        run: What is run. If it has an attribute `progress`, that is set to a function of the share that is done.
        task: Candidate, learning rate and seed.
        tick: Called with the share that is done.
    """
    if hasattr(run, "progress"):
        setattr(run, "progress", tick)  # noqa: B010  # a function has no such attribute
    begun = time.perf_counter()
    try:
        outcome = Outcome.of(run(task.candidate, task.seed, task.lr))
    except Exception as error:
        outcome = Outcome.crash(error)
    if outcome.seconds:
        return outcome
    return Outcome(**{**vars(outcome), "seconds": time.perf_counter() - begun})


class Serial:
    """One run at a time, in this process."""

    def __init__(self, run: Run, tick: Tick) -> None:
        self._run, self._tick = run, tick
        self._tasks: list[Task] = []

    @property
    def free(self) -> bool:
        return not self._tasks

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def next(self) -> tuple[Task, Outcome]:
        """Wait for a run to end."""
        task = self._tasks.pop()
        return task, execute(self._run, task, lambda share: self._tick(task, share))

    def close(self) -> None:
        """Nothing is left."""


class Processes:
    """Several runs at a time, each in a process with its share of the threads. One that dies costs its run only.

    Args:
        run: What is run; it must be picklable.
        tick: Called with the share of a run that is done.
        count: Number of processes.

    Raises:
        OptionError: if `run` cannot be sent to a process.
    """

    def __init__(self, run: Run, tick: Tick, count: int) -> None:
        self._run, self._tick, self._count = run, tick, count
        self._context = multiprocessing.get_context("spawn")
        self._threads = max(1, torch.get_num_threads() // count)
        self._idle: list[tuple[Any, Connection]] = []
        self._at_work: dict[Connection, tuple[Any, Task]] = {}

    @property
    def free(self) -> bool:
        return len(self._at_work) < self._count

    @property
    def busy(self) -> bool:
        return bool(self._at_work)

    def submit(self, task: Task) -> None:
        process, connection = self._idle.pop() if self._idle else self._start()
        connection.send(task)
        self._at_work[connection] = process, task

    def next(self) -> tuple[Task, Outcome]:
        """Wait for a run to end."""
        while True:
            for ready in wait(list(self._at_work)):
                assert isinstance(ready, Connection)
                process, task = self._at_work[ready]
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    del self._at_work[ready]
                    process.join(GRACE)
                    return task, Outcome("crashed", f"its process ended with {_end(process.exitcode)}.")
                if isinstance(message, Outcome):
                    del self._at_work[ready]
                    self._idle.append((process, ready))
                    return task, message
                self._tick(task, message)

    def close(self) -> None:
        """End the processes, whatever they do."""
        processes = [process for process, _ in [*self._idle, *self._at_work.values()]]
        for connection in [*(connection for _, connection in self._idle), *self._at_work]:
            connection.close()
        for process, _ in self._at_work.values():
            process.terminate()
        for process in processes:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._idle, self._at_work = [], {}

    def _start(self) -> tuple[Any, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._run, there, self._threads))
        try:
            process.start()
        except Exception as error:  # pickle raises several kinds
            raise OptionError(
                f"what is to run cannot be sent to another process: {error}. Use functions and classes of a module, or "
                "processes=1."
            ) from error
        there.close()
        return process, here


def _work(run: Run, connection: Connection, threads: int) -> None:
    """The life of a process: it does the runs that it gets until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    torch.set_num_threads(threads)
    last = 0.0

    def tick(share: float) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            connection.send(share)

    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            outcome = execute(run, task, tick)
        except KeyboardInterrupt:  # Lightning's answer to the end that the first process asks for
            return
        connection.send(outcome)


def _end(code: int | None) -> str:
    if code is None or code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
