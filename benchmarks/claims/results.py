"""The runs of an experiment, as its judge and its picture ask for them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.claims.claim import Arm, Part
from lightning_optim.race.metric import Metric
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.store import Key
from lightning_optim.race.summary import best_of, points_of

TUNING = 1000  # the first of the seeds on which arms choose


@dataclass(frozen=True)
class Cell:
    """An arm with its options, at a learning rate."""

    name: str
    options: Mapping[str, Any]
    lr: float


@dataclass
class Measured:
    """The runs of a part by candidate, learning rate and seed."""

    part: Part
    runs: dict[Key, Outcome]

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.part.arms if arm.name == name)

    def rates(self, arm: str) -> list[float]:
        """The learning rates that an arm has tried, from the lowest."""
        names = {cell.name for cell in self.arm(arm).cells()}
        return sorted({lr for name, lr, _ in self.runs if name in names})

    def best(self, arm: str) -> Cell:
        """The cell of an arm's grid with the best mean; of the tuning seeds, where there are such."""
        tuning = bool(self.part.tuning)
        runs = {key: outcome for key, outcome in self.runs.items() if (key[2] >= TUNING) == tuning}
        metric = Metric(self.part.metric, self.part.mode)
        found: list[tuple[int, float, int, Cell]] = []
        for cell in self.arm(arm).cells():
            best = best_of(points_of(cell, runs, metric), metric)
            if best is not None:
                mean = metric.sign * best.mean if best.mean is not None else float("inf")
                found.append((-len(best.values), mean, len(found), Cell(cell.name, cell.spec, best.lr)))
        return min(found, key=lambda one: one[:3])[3]

    def cell(self, arm: str, lr: float | None = None, **options: Any) -> Cell:
        """A cell of an arm's grid: the best one, or that of the learning rate and options."""
        if lr is None:
            return self.best(arm)
        cells = [c for c in self.arm(arm).cells() if all(c.spec[key] == value for key, value in options.items())]
        return Cell(cells[0].name, cells[0].spec, lr)

    def outcomes(self, arm: str, lr: float | None = None, **options: Any) -> dict[int, Outcome]:
        """The measured runs of a cell by seed."""
        cell = self.cell(arm, lr, **options)
        return {
            seed: outcome
            for (name, rate, seed), outcome in sorted(self.runs.items())
            if name == cell.name and rate == cell.lr and seed < TUNING
        }

    def values(self, arm: str, lr: float | None = None, metric: str | None = None, **options: Any) -> dict[int, float]:
        """A metric of the measured runs of a cell by seed; by default that of the part at the best cell."""
        name = metric or self.part.metric
        found = self.outcomes(arm, lr, **options)
        return {seed: outcome.metrics[name] for seed, outcome in found.items() if name in outcome.metrics}

    def mean(self, arm: str, lr: float | None = None, metric: str | None = None, **options: Any) -> float:
        """The mean of `values`; NaN where there are none."""
        values = self.values(arm, lr, metric, **options)
        return statistics.fmean(values.values()) if values else float("nan")

    def over_rates(self, arm: str, metric: str | None = None, **options: Any) -> dict[int, float]:
        """The mean of `values` over the learning rates of a cell, by seed, where a part has no tuning."""
        by_rate = [self.values(arm, lr, metric, **options) for lr in self.rates(arm)]
        seeds = [seed for seed in by_rate[0] if all(seed in values for values in by_rate)]
        return {seed: statistics.fmean(values[seed] for values in by_rate) for seed in seeds}

    def curves(
        self, arm: str, curve: str, lr: float | None = None, **options: Any
    ) -> list[tuple[Sequence[float], Sequence[float]]]:
        """A curve of the measured runs of a cell, for each seed its steps and values."""
        found = self.outcomes(arm, lr, **options).values()
        return [outcome.curves[curve] for outcome in found if curve in outcome.curves]


Results = Mapping[str, Measured]  # by part
