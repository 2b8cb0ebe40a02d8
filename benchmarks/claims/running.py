"""Runs the parts of experiments; what is over is kept in a folder, and not run again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.claims.claim import Claim, Part
from benchmarks.claims.files import as_plain, write
from benchmarks.claims.results import TUNING, Measured
from benchmarks.claims.size import Size
from benchmarks.records import Record, machine
from lightning_optim.errors import OptionError
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.progress import Progress, Silent
from lightning_optim.race.race import Race
from lightning_optim.race.store import Key
from lightning_optim.race.workers import Task
from lightning_optim.reports.memory import human


class Within:
    """Progress of a race that is one of several on one bar.

    Args:
        bar: The bar.
        total: The runs of all races together.
    """

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar, self._others = bar, total
        bar.begin(total)

    def begin(self, total: int) -> None:
        self._others -= total
        self._total = total

    def share(self, task: Task, share: float) -> None:
        self._bar.share(task, share)

    def ended(self, task: Task, outcome: Outcome | None, total: int, stored: bool = False) -> None:
        self._total = total
        self._bar.ended(task, outcome, self._others + total, stored)

    def close(self) -> None:
        """The race is over; what its grids have grown by stays in the total."""
        self._others += self._total

    def end(self) -> None:
        """All are over."""
        self._bar.close()


def planned(part: Part) -> int:
    """The number of runs of a part, without those by which grids grow."""
    cells = sum(len(arm.cells()) for arm in part.arms) * len(part.factors)
    return cells * part.tuning + len(part.arms) * part.seeds if part.tuning else cells * part.seeds


def run_part(part: Part, folder: Path, processes: int, progress: Progress | None = None) -> Measured:
    """Do the runs of a part that the folder does not hold.

    Args:
        part: What is run.
        folder: Where runs are kept.
        processes: Runs at a time.
        progress: What is told.

    Raises:
        OptionError: for an arm all of whose runs crashed.
    """
    progress = progress or Silent()
    terms: dict[str, Any] = {"metric": part.metric, "mode": part.mode, "processes": processes, "progress": progress}
    cells = [cell for arm in part.arms for cell in arm.cells()]
    where = folder / part.key
    if not part.tuning:
        seeds = list(range(part.seeds))
        race = Race(part.run, cells, seeds=seeds, factors=part.factors, extend=part.extend, folder=where, **terms)
        return Measured(part, _go(part, race))
    seeds = list(range(TUNING, TUNING + part.tuning))
    tuning = Race(part.run, cells, seeds=seeds, factors=part.factors, extend=part.extend, folder=where, **terms)
    found = Measured(part, _go(part, tuning))
    best = [Candidate(cell.name, cell.lr, cell.options) for cell in (found.best(arm.name) for arm in part.arms)]
    last = Race(part.run, best, seeds=list(range(part.seeds)), factors=(1.0,), extend=0, folder=where, **terms)
    return Measured(part, {**found.runs, **_go(part, last)})


def _go(part: Part, race: Race) -> dict[Key, Outcome]:
    """The runs of a race. One that crashed is a fault of the experiment, and no result."""
    race.go()
    for (name, lr, seed), outcome in race.runs.items():
        if outcome.status == "crashed":
            raise OptionError(f"{part.name}: {name} at lr {lr:g} with seed {seed} crashed: {outcome.reason}")
    return race.runs


def check_memory(parts: list[Part], size: Size, processes: int) -> None:
    """Refuse a size whose runs do not fit in memory.

    Raises:
        OptionError: if the runs at one time need more than there is.
    """
    needed, free = max(part.bytes for part in parts) * processes, available_bytes()
    if needed > free:
        raise OptionError(
            f"size {size.name} needs about {human(needed)} for runs ({processes} at a time), and {human(free)} are "
            "free. Take a smaller --size, or --processes 1."
        )


def available_bytes() -> int:
    """The memory that a process can still get."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run_claim(claim: Claim, size: Size, folder: Path, processes: int, progress: Progress | None = None) -> Record:
    """Run a claim's experiment, and write its result to the folder.

    Args:
        claim: Whose experiment.
        size: How large.
        folder: Where its runs are kept, and the result as `NAME.json`.
        processes: Runs at a time.
        progress: What is told.

    Returns:
        The result, as it was written.

    Raises:
        OptionError: for a size that does not fit in memory, and where an arm cannot be run.
    """
    parts = claim.parts(size)
    check_memory(parts, size, processes)
    results = {part.name: run_part(part, folder / claim.name, processes, progress) for part in parts}
    seconds = sum(outcome.seconds for found in results.values() for outcome in found.runs.values())
    about = {"claim": claim.name, "size": size.name, "seconds": round(seconds / processes, 1)}
    record = {"about": {**about, "processes": processes, **machine()}, "parts": as_plain(results)}
    write(folder / f"{claim.name}.json", record)
    return record


def forget(claim: Claim, folder: Path) -> None:
    """Remove the runs of a claim from a folder."""
    shutil.rmtree(folder / claim.name, ignore_errors=True)
