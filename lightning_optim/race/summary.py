"""What the runs of a race say: for each candidate its best learning rate, and how it differs from the first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_optim.race.candidate import Candidate
from lightning_optim.race.metric import TRAINING_LOSS, Metric
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.statistics import LEVEL, Difference, holm, paired, spread
from lightning_optim.race.store import Key

ROUNDING = 1e-6  # of the metric: what arithmetic in another order may change in float32


@dataclass(frozen=True)
class Point:
    """A candidate at one learning rate: its metric by seed, and the seeds that failed with the reason."""

    lr: float
    values: dict[int, float]
    failures: dict[int, str]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None


@dataclass
class Standing:
    """A candidate in the table.

    Attributes:
        candidate: Who.
        points: By learning rate, from the lowest.
        best: The point of the best learning rate; None if no run is over.
        at_edge: Whether the best lies at the edge of what was tried.
        outcomes: The runs at the best learning rate by seed.
        difference: To the first candidate; None for itself, or where no seed is shared.
        p: The p-value, corrected for all comparisons by Holm.
        verdict: One sentence on the difference.
    """

    candidate: Candidate
    points: list[Point]
    best: Point | None
    at_edge: bool = False
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    difference: Difference | None = None
    p: float | None = None
    verdict: str = ""

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for fewer than two."""
        values = list(self.best.values.values()) if self.best else []
        return spread(values) if len(values) > 1 else None

    def mean_of(self, name: str) -> float | None:
        """The mean of another metric over the runs at the best learning rate."""
        found = [o.metrics[name] for o in self.outcomes.values() if o.status == "finished" and name in o.metrics]
        return statistics.fmean(found) if found else None

    @property
    def training_loss(self) -> float | None:
        return self.mean_of(TRAINING_LOSS)

    @property
    def step_seconds(self) -> float | None:
        """The median over the runs at all seeds."""
        found = [o.step_seconds for o in self.outcomes.values() if o.step_seconds is not None]
        return statistics.median(found) if found else None

    @property
    def state_bytes(self) -> int | None:
        found = [o.state_bytes for o in self.outcomes.values() if o.state_bytes is not None]
        return max(found) if found else None

    @property
    def note(self) -> str:
        """What went wrong, and what else a reader should know."""
        notes = []
        if self.best is not None and self.best.failures:
            total = len(self.best.failures) + len(self.best.values)
            reason = next(iter(self.best.failures.values()))
            some = "" if not self.best.values else f"{len(self.best.failures)} of {total} seeds failed: "
            notes.append(some + reason)
        failed = [point.lr for point in self.points if point.failures and point is not self.best]
        if failed and self.best is not None and self.best.values:
            notes.append(f"It failed at lr {', '.join(f'{lr:g}' for lr in failed)}.")
        early = {o.steps for o in self.outcomes.values() if o.status == "finished" and o.facts.get("early")}
        if early:
            notes.append(f"A callback stopped it after {min(early)} steps.")
        return " ".join([*notes, *([self.candidate.note] if self.candidate.note else [])])


def points_of(candidate: Candidate, runs: Mapping[Key, Outcome], metric: Metric) -> list[Point]:
    """A candidate's runs by learning rate."""
    found: dict[float, Point] = {}
    for (name, lr, seed), outcome in sorted(runs.items()):
        if name == candidate.name:
            point = found.setdefault(lr, Point(lr, {}, {}))
            if failure := outcome.failure(metric.name):
                point.failures[seed] = failure
            else:
                point.values[seed] = outcome.metrics[metric.name]
    return list(found.values())


def best_of(points: Sequence[Point], metric: Metric) -> Point | None:
    """The learning rate with the best mean over seeds, of those at which most seeds finished; the lowest of equals."""

    def rank(point: Point) -> tuple[int, float]:
        return -len(point.values), 0.0 if point.mean is None else metric.sign * point.mean

    return min(points, key=rank, default=None)


def summarize(candidates: Sequence[Candidate], runs: Mapping[Key, Outcome], metric: Metric) -> list[Standing]:
    """The rows of the table, in the order of candidates; all others are compared with the first."""
    rows = []
    for candidate in candidates:
        points = points_of(candidate, runs, metric)
        best = best_of(points, metric)
        row = Standing(candidate, points, best)
        if best is not None:
            row.outcomes = {key[2]: o for key, o in runs.items() if key[:2] == (candidate.name, best.lr)}
            row.at_edge = bool(best.values) and len(points) > 1 and best in (points[0], points[-1])
        rows.append(row)
    first, *others = rows
    for row in others:
        if row.best and first.best:
            row.difference = paired(row.best.values, first.best.values)
    for row, p in zip(others, holm([row.difference.p if row.difference else None for row in others]), strict=True):
        row.p = p
        row.verdict = verdict(row, first, metric)
    return rows


def verdict(row: Standing, first: Standing, metric: Metric) -> str:
    """One honest sentence on a candidate and the first."""
    pair = f"between {row.name} and {first.name}"
    for one in (first, row):
        if one.best is None or not one.best.values:
            return f"{one.name} finished no run, so nothing is said on the difference {pair}."
    found = row.difference
    if found is None:
        return f"{row.name} and {first.name} finished no seed in common, so nothing is said on their difference."
    seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
    better = metric.sign * found.mean < 0
    by = f"{metric.name} is {'lower' if found.mean < 0 else 'higher'} by {abs(found.mean):.3g}"
    if found.seeds == 1:
        return f"With one seed no difference can be told from chance {pair}: {by} with {row.name}. Take --seeds 5."
    size = max(abs(x) for one in (first, row) if one.best for x in one.best.values.values())
    if 0 < max(abs(end) for end in (found.mean, found.low or 0.0, found.high or 0.0)) <= ROUNDING * size:
        return f"{row.name} and {first.name} differ by rounding only ({abs(found.mean):.1g}, {seeds})."
    if found.p is None:
        return f"No test {pair}: {by} with {row.name} for each of {seeds}, without any spread."
    assert row.p is not None
    word = "better" if better else "worse"
    if found.p < LEVEL <= row.p:
        return (
            f"{row.name} looks {word} than {first.name}: {by}. By the number of comparisons that may be chance (p "
            f"{_is(row.p)}, and {number(found.p)} alone, {seeds}); more seeds would tell."
        )
    if row.p >= LEVEL:
        return f"No difference seen {pair} with {seeds} (p {_is(row.p)})."
    interval = f"{found.low:.3g} to {found.high:.3g}"
    return f"{row.name} is {word} than {first.name}: {by} (difference {interval}, p {_is(row.p)}, {seeds})."


def number(p: float) -> str:
    """A p-value in print.

    Example:
        >>> number(0.0312), number(1e-9)
        ('0.031', '<0.0001')
    """
    return f"{p:.2g}" if p >= 1e-4 else "<0.0001"


def _is(p: float) -> str:
    return f"= {number(p)}" if p >= 1e-4 else "< 0.0001"
