"""The result of a race: a table, its data, sentences on what can be said, and files."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.config import layout
from lightning_optim.race.metric import TRAINING_LOSS, Metric
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.store import Key
from lightning_optim.race.summary import Standing, number
from lightning_optim.reports.memory import human

MOST_WARNINGS = 3


@dataclass(frozen=True)
class Comparison:
    """What a race has found.

    Attributes:
        standings: A row for each candidate, in their order; others are compared with the first.
        metric: What they are compared by.
        runs: All runs, by candidate, learning rate and seed.
        about: Settings, versions and the command, in words.
        notes: What else a reader should know.
    """

    standings: list[Standing]
    metric: Metric
    runs: dict[Key, Outcome]
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([self.table(), "", *self.sentences()])

    @property
    def best(self) -> Standing:
        """The candidate with the best mean."""
        return min(self.standings, key=lambda one: _rank(one, self.metric))

    def head(self) -> list[str]:
        """The titles of the columns."""
        loss = [TRAINING_LOSS] if self.metric.name != TRAINING_LOSS else []
        first = f"difference to {self.standings[0].name}"
        return ["candidate", "best lr", self.metric.name, *loss, *self.others(), first, "p", "ms/step", "state"]

    def rows(self) -> list[list[str]]:
        """The cells of the table."""
        return [self._cells(standing) for standing in self.standings]

    def table(self, width: int | None = None) -> str:
        """The table as text.

        Args:
            width: Columns; by default those of the terminal.
        """
        return layout.table(self.head(), self.rows(), layout.terminal_width() if width is None else width)

    def sentences(self) -> list[str]:
        """What can be said on the differences, what went wrong, and how the numbers were found."""
        told = self.findings()
        return [*told, *self.method()]

    def findings(self) -> list[str]:
        """What can be said on the differences, and what went wrong."""
        told = [one.verdict for one in self.standings[1:]]
        told += [f"{one.name}: {one.note}" for one in self.standings if one.note]
        if edges := [one.name for one in self.standings if one.at_edge]:
            told.append(
                f"The best learning rate of {', '.join(edges)} lies at the edge of what was tried. A larger --extend, "
                "or another --lr, would go on there."
            )
        return [*told, *self.notes]

    def method(self) -> list[str]:
        """How the numbers were found."""
        tests = sum(one.p is not None for one in self.standings)
        corrected = f", corrected for {tests} comparisons by Holm's method" if tests > 1 else ""
        pairs = (
            "Differences are paired by seed, with their 95 % confidence interval. p is that of the two-sided paired "
            f"t-test{corrected}; intervals are of one comparison each."
        )
        return [
            f"Values are means over seeds ± their standard deviation at the end of a run; of {self.metric.name} "
            f"{self.metric.direction}. The best learning rate is the one with the best mean over seeds, of the same "
            "runs: so values are a little too good, for all candidates alike.",
            *([pairs] if len(self.standings) > 1 else []),
            "The training loss is the mean over the last tenth of the steps. ms/step is the median time of a training "
            "step, candidates in turns: a rough number. State is all state of the optimizer at the end of a run.",
        ]

    def data(self) -> dict[str, Any]:
        """The table as plain values, for JSON."""
        return {
            "metric": self.metric.name,
            "mode": self.metric.mode,
            "about": self.about,
            "candidates": [self._data(standing) for standing in self.standings],
            "notes": self.notes,
        }

    def others(self) -> list[str]:
        """The loss of the validation, where the metric is another."""
        names = {n for one in self.standings for o in one.outcomes.values() for n in o.facts.get("validated", ())}
        losses = sorted((name for name in names if "loss" in name.lower() and name != self.metric.name), key=len)
        return losses[:1]

    def _cells(self, one: Standing) -> list[str]:
        mean, spread = one.best.mean if one.best else None, one.spread
        value = "–" if mean is None else f"{mean:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
        means = [one.mean_of(name) for name in self.head()[3:] if name in (TRAINING_LOSS, *self.others())]
        difference = p = "–"
        if one.difference is not None:
            difference = f"{one.difference.mean:+.3g}"
            if one.difference.low is not None:
                difference += f" [{one.difference.low:+.2g}, {one.difference.high:+.2g}]"
            p = number(one.p) if one.p is not None else "–"
        failed = one.best is not None and not one.best.values
        return [
            one.name,
            "–" if one.best is None or failed else f"{one.best.lr:g}",
            self._failure(one) if failed or one.best is None else value,
            *("–" if found is None else f"{found:.4g}" for found in means),
            difference,
            p,
            "–" if one.step_seconds is None else f"{1e3 * one.step_seconds:.3g}",
            "–" if one.state_bytes is None else human(one.state_bytes),
        ]

    @staticmethod
    def _failure(one: Standing) -> str:
        return " and ".join(sorted({o.status for o in one.outcomes.values()} - {"finished"})) or "no value"

    def _data(self, one: Standing) -> dict[str, Any]:
        difference = None if one.difference is None else dataclasses.asdict(one.difference)
        runs = one.outcomes.values()
        return {
            "candidate": one.name,
            "spec": one.candidate.spec,
            "lr": one.best.lr if one.best and one.best.values else None,
            "mean": one.best.mean if one.best else None,
            "std": one.spread,
            "values": {str(seed): value for seed, value in one.best.values.items()} if one.best else {},
            "metrics": {name: one.mean_of(name) for name in dict.fromkeys(n for o in runs for n in o.metrics)},
            "difference": difference,
            "p_holm": one.p,
            "step_seconds": one.step_seconds,
            "state_bytes": one.state_bytes,
            "at_edge": one.at_edge,
            "grid": [
                {"lr": point.lr, "mean": point.mean, "failures": {str(s): why for s, why in point.failures.items()}}
                for point in one.points
            ],
            "verdict": one.verdict,
            "note": one.note,
        }


def notes_of(runs: dict[Key, Outcome]) -> list[str]:
    """What candidates replace, whether all began and were fed alike, and what runs have warned of."""
    return [*_replaced(runs), *_unlike(runs), *_warnings(runs)]


def _replaced(runs: dict[Key, Outcome]) -> Iterator[str]:
    for name in sorted({outcome.facts["replaced"] for outcome in runs.values() if "replaced" in outcome.facts}):
        yield (
            f"Candidates replace the optimizer that {name} configures, and its schedule. Give them one by "
            "{name: adamw, schedule: cosine}."
        )


def _unlike(runs: dict[Key, Outcome]) -> Iterator[str]:
    for fact, what, why in (
        ("start", "first weights", "Its __init__ or a callback takes random numbers or looks at the optimizer."),
        ("batches", "batches", "The data or a callback does not follow the seed, or runs had different lengths."),
    ):
        by_seed: dict[int, dict[str, str]] = defaultdict(dict)
        for (name, _, seed), outcome in runs.items():
            if outcome.status == "finished" and not outcome.facts.get("early") and fact in outcome.facts:
                by_seed[seed].setdefault(outcome.facts[fact], name)
        for seed, found in by_seed.items():
            if len(found) > 1:
                one, other = list(found.values())[:2]
                whose = f"{one} and {other}" if one != other else f"the runs of {one}"
                yield f"The {what} of {whose} differ at seed {seed}, so they are not compared on the same terms. {why}"
                break


def _warnings(runs: dict[Key, Outcome]) -> Iterator[str]:
    names: dict[str, str] = {}
    for (name, _, _), outcome in runs.items():
        for text in outcome.facts.get("warnings", ()):
            names.setdefault(text, name)
    for text, name in list(names.items())[:MOST_WARNINGS]:
        yield f"{name} warned: {text}"
    if len(names) > MOST_WARNINGS:
        yield f"{len(names) - MOST_WARNINGS} other warnings are in the runs."


def _rank(one: Standing, metric: Metric) -> tuple[bool, float]:
    mean = one.best.mean if one.best else None
    return mean is None, metric.sign * (mean if mean is not None else math.inf)
