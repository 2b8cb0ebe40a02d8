"""The pieces of the benchmark in their order: what tells most comes first, for the time may end at any piece."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.gpu.processes import Piece
from benchmarks.gpu.programs import counters, first_steps, tests, two_ranks
from benchmarks.gpu.race import copy, race
from benchmarks.gpu.setting import Result, Setting
from benchmarks.gpu.steps import replay_times, steps
from benchmarks.kernel_checks import RACED, check_optimizer
from lightning_optim.core.optimizer import OPTIMIZERS


def pieces(setting: Setting) -> list[Piece]:
    """All pieces."""
    return list(_pieces(setting))


def _pieces(setting: Setting) -> Iterator[Piece]:
    names = [name for name in RACED if not setting.tiny or name in setting.optimizers]
    rest = [] if setting.tiny else [name for name in sorted(OPTIMIZERS) if name not in RACED]
    main, *others = setting.lists
    yield Piece("copy", copy)
    yield from (_checks(name) for name in names)
    yield from (_race(main, name) for name in setting.optimizers)
    yield from (_race(which, "adamw") for which in others)
    yield from (_steps(name) for name in names)
    yield Piece("two ranks", two_ranks, limit=60)
    yield Piece("tests", tests, limit=75)
    yield from (_checks(name) for name in rest)
    yield from (_steps(name) for name in rest)
    yield Piece("counters", counters, limit=120)
    yield from (Piece(f"replay/{which}", functools.partial(replay_times, which=which)) for which in setting.lists)
    yield _race(main, "adamw", torch.bfloat16)
    yield Piece("first steps", first_steps, limit=120)
    yield from (_race(which, name) for which in others for name in setting.optimizers if name != "adamw")
    yield _race(main, "adamw", slow=True)


def _race(which: str, name: str, dtype: torch.dtype = torch.float32, slow: bool = False) -> Piece:
    label = f"race/{which}/{name}/{str(dtype).removeprefix('torch.')}{'/slow' if slow else ''}"
    run = functools.partial(race, which=which, name=name, dtype=dtype, slow=slow)
    return Piece(label, run, limit=600 if slow else 90)


def _steps(name: str) -> Piece:
    return Piece(f"steps/{name}", functools.partial(steps, name=name), limit=60, alone=False)


def _checks(name: str) -> Piece:
    return Piece(f"checks/{name}", functools.partial(checked, name=name), limit=150, alone=False)


def checked(setting: Setting, name: str) -> Result:
    """Every kernel of an optimizer against the reference."""
    return check_optimizer(name, str(setting.device), quick=setting.tiny)
