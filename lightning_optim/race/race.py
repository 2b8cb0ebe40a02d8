"""A race: every candidate at every learning rate of its grid with every seed, from a function that does one run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_optim.errors import OptionError, is_whole, shown
from lightning_optim.race import grid
from lightning_optim.race.candidate import Candidate, check_candidates
from lightning_optim.race.metric import Metric, choose
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.progress import Progress, Silent
from lightning_optim.race.store import Key, Store
from lightning_optim.race.summary import Standing, best_of, points_of, summarize
from lightning_optim.race.workers import Processes, Run, Serial, Task


class Race:
    """Compares candidates on any function `run(candidate, seed, lr)`.

    The runs of a seed come before those of the next, and candidates take turns, so a race that is stopped has compared
    all of them, and what slows the machine down for a while meets all alike. Where the best learning rate of a
    candidate, that of the best mean over seeds, lies at the edge of its grid, the grid grows beyond it.

    Args:
        run: Does one run and returns an `Outcome`, or metrics by name; a list is a curve. Its errors are caught.
        candidates: Who takes part; the first is the one that others are compared with.
        seeds: The seeds, the same for all.
        factors: The grid: factors on a candidate's learning rate.
        metric: What decides; by default the validation loss, else the training loss.
        mode: "min" or "max"; by default by the name of the metric.
        extend: The most learning rates by which a grid may grow.
        folder: Where runs are kept; one that is there already is continued. None keeps nothing.
        settings: What else decides the numbers; a folder with other settings is refused.
        processes: Number of runs at a time. More than 1 run in processes of their own.
        progress: What is told while it runs.

    Raises:
        OptionError: for wrong arguments, and for a folder that holds something else.

    Example:
        >>> def run(candidate, seed, lr):  # gradient descent on a parabola, or on a steeper one
        ...     x, curvature = 1.0 + 0.1 * seed, candidate.spec
        ...     for _ in range(10):
        ...         x -= lr * curvature * x
        ...     return {"loss": curvature * x * x / 2}
        >>> race = Race(run, [Candidate("flat", 0.5, 1.0), Candidate("steep", 0.05, 10.0)], seeds=[0, 1, 2])
        >>> [(standing.name, standing.best.lr) for standing in race.go()]
        [('flat', 1.5), ('steep', 0.15)]
    """

    def __init__(
        self,
        run: Run,
        candidates: Sequence[Candidate],
        *,
        seeds: Sequence[int] = (0, 1, 2),
        factors: Sequence[float] = grid.FACTORS,
        metric: str | None = None,
        mode: str | None = None,
        extend: int = 2,
        folder: str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        processes: int = 1,
        progress: Progress | None = None,
    ) -> None:
        check_candidates(candidates)
        self.run, self.candidates = run, list(candidates)
        self.seeds = check_seeds(seeds)
        self.factors = grid.read_factors(factors)
        self._asked = metric, mode
        if not is_whole(extend, 0):
            raise OptionError(f"extend={shown(extend)} must be a number of learning rates, at least 0.")
        if not is_whole(processes):
            raise OptionError(f"processes={shown(processes)} must be a number of processes, at least 1.")
        self.extend, self.processes = extend, processes
        self.progress: Progress = Silent() if progress is None else progress
        self.store = Store(folder, settings or {})
        self.runs: dict[Key, Outcome] = {}
        self.metric: Metric | None = None
        self._added = dict.fromkeys((candidate.name for candidate in self.candidates), 0)
        self._open: dict[str, int] = {}  # by candidate the runs that are not over

    def go(self) -> list[Standing]:
        """Run what is not there yet.

        Raises:
            OptionError: if no run has found the metric.
            KeyboardInterrupt: when it is stopped. What was finished is kept in the folder.
        """
        known = self.store.known({candidate.name: candidate for candidate in self.candidates})
        tasks = deque(self._grid())
        total = len(tasks)
        self._open = {c.name: sum(task.candidate is c for task in tasks) for c in self.candidates}
        self.progress.begin(total)
        share = self.progress.share
        pool = Serial(self.run, share) if self.processes == 1 else Processes(self.run, share, self.processes)
        try:
            while tasks or pool.busy:
                stored = False
                if tasks and pool.free:
                    task = tasks.popleft()
                    outcome = known.get((task.candidate.name, task.lr, task.seed))
                    stored = outcome is not None
                    if outcome is None and not self._hopeless(task.candidate):
                        pool.submit(task)
                        continue
                else:
                    task, outcome = pool.next()
                    self.store.add(task.candidate, task.lr, task.seed, outcome)
                more = self._over(task, outcome)
                tasks.extend(more)
                total += len(more)
                self.progress.ended(task, outcome, total, stored)
        finally:
            pool.close()
            self.progress.close()
        return self.standings()

    def _grid(self) -> Iterator[Task]:
        """All runs of the grids: the seeds one after another, and candidates in turns."""
        for seed in self.seeds:
            for turn in range(len(self.factors)):
                for candidate in self.candidates:
                    for lr in grid.rates(candidate.lr, self.factors)[turn : turn + 1]:
                        yield Task(candidate, lr, seed)

    def _hopeless(self, candidate: Candidate) -> bool:
        """Whether as many runs of a candidate as its grid has learning rates have crashed, and none has not."""
        found = [outcome.status for (name, _, _), outcome in self.runs.items() if name == candidate.name]
        return len(found) >= len(self.factors) and set(found) == {"crashed"}

    def standings(self) -> list[Standing]:
        """The rows of the table, from the runs that are over."""
        if self.metric is None:
            reasons = {key[0]: outcome.reason for key, outcome in self.runs.items()}
            told = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in reasons.items())
            raise OptionError(f"no run has finished, so there is nothing to compare. {told}.")
        return summarize(self.candidates, self.runs, self.metric)

    def _over(self, task: Task, outcome: Outcome | None) -> list[Task]:
        """Count a run that is over, and return what its candidate should run beyond its grid."""
        candidate = task.candidate
        self._open[candidate.name] -= 1
        if outcome is not None:
            self.runs[candidate.name, task.lr, task.seed] = outcome
        if self.metric is None and outcome is not None and outcome.status == "finished":
            self.metric = choose(*self._asked, outcome.metrics, outcome.facts.get("validated", ()))
        if self._open[candidate.name] or self.metric is None or self._added[candidate.name] >= self.extend:
            return []
        points = points_of(candidate, self.runs, self.metric)
        best = best_of(points, self.metric)
        tried = [point.lr for point in points]
        if best is not None and best.values:
            lr = grid.beyond(tried, best.lr)
        else:  # too high, as far as is known
            diverged = any(o.status != "crashed" for key, o in self.runs.items() if key[0] == candidate.name)
            lr = grid.beyond(tried, min(tried)) if diverged else None
        if lr is None:
            return []
        self._added[candidate.name] += 1
        self._open[candidate.name] += len(self.seeds)
        return [Task(candidate, lr, seed) for seed in self.seeds]


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list.

    Raises:
        OptionError: for no seed, one that is no whole number, and one that is given twice.
    """
    found = list(seeds)
    if not found or not all(is_whole(seed, 0) and seed < 2**32 for seed in found):
        raise OptionError(f"seeds={shown(found)} must be at least one whole number of 0 or more.")
    if len(set(found)) < len(found):
        raise OptionError(f"seeds={shown(found)} has a seed twice.")
    return found
