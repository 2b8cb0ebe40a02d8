"""Runs pieces in processes of their own: after an access out of bounds CUDA refuses all further work of its process."""

from __future__ import annotations

import json
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import Result, Setting


@dataclass(frozen=True)
class Piece:
    """A part of the benchmark that has a result of its own.

    Attributes:
        name: The name under which its result is saved.
        run: Does it.
        limit: Seconds after which it is ended.
        alone: Whether nothing else may run beside it, since it measures time.
    """

    name: str
    run: Callable[[Setting], Result]
    limit: float = 60.0
    alone: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a piece: a result, or why there is none."""

    result: Result | None
    failed: str
    seconds: float


@dataclass
class _Running:
    piece: Piece
    process: Any
    begun: float


def run(pieces: Sequence[Piece], setting: Setting, end: float, method: str) -> Iterator[tuple[str, Outcome]]:
    """The outcomes of pieces as they come. None begins after `end`, a time of `time.monotonic()`.

    Args:
        pieces: The pieces, in their order.
        setting: What they run with.
        end: After which time none begins.
        method: How their processes start: "fork" saves each the imports, and "spawn" works where fork does not.
    """
    context = multiprocessing.get_context(method)
    waiting, running = list(pieces), list[_Running]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and time.monotonic() < end and _may_begin(waiting[0], running, setting.jobs):
                piece = waiting.pop(0)
                args = (piece.run, setting, _file(folder, piece))
                process: Any = context.Process(target=_work, args=args)  # type: ignore[attr-defined]
                process.start()
                running.append(_Running(piece, process, time.monotonic()))
            if not running:  # the time is up
                return
            for one in [one for one in running if _has_ended(one)]:
                running.remove(one)
                yield one.piece.name, _outcome(one, _file(folder, one.piece))
            time.sleep(0.01)


def _may_begin(piece: Piece, running: Sequence[_Running], jobs: int) -> bool:
    if piece.alone or any(one.piece.alone for one in running):
        return not running
    return len(running) < jobs


def _file(folder: str, piece: Piece) -> Path:
    return Path(folder, piece.name.replace("/", "_") + ".json")


def _has_ended(one: _Running) -> bool:
    if one.process.is_alive() and time.monotonic() - one.begun > one.piece.limit:
        one.process.kill()
        one.process.join()
    return not one.process.is_alive()


def _outcome(one: _Running, file: Path) -> Outcome:
    seconds, code = time.monotonic() - one.begun, one.process.exitcode
    if file.exists():
        found = json.loads(file.read_text())
        return Outcome(found.get("result"), found.get("failed", ""), seconds)
    if code == -signal.SIGKILL and seconds > one.piece.limit:
        return Outcome(None, f"took more than {one.piece.limit:.0f} s", seconds)
    return Outcome(None, f"its process ended with {code}", seconds)


def _work(function: Callable[[Setting], Result], setting: Setting, file: Path) -> None:
    try:
        found: Result = {"result": function(setting)}
    except BaseException as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {str(error)[:2000]}"}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(file)
