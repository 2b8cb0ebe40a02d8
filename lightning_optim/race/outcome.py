"""What one run found, as it is kept in a file."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_optim.errors import OptionError, first_line, is_number, shown

Status = Literal["finished", "diverged", "crashed"]
Curve = tuple[list[float], list[float]]
MOST_POINTS = 240  # of a curve in a file; neighbours are averaged


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        status: "finished", "diverged" where a loss or metric was not finite, or "crashed" after an error.
        reason: Why it did not finish.
        metrics: Last values by name.
        curves: Of each name the steps, and the values at them.
        steps: Optimizer steps that it took.
        seconds: How long it ran.
        step_seconds: The median time of a training step.
        state_bytes: Bytes of the optimizer's state at the end.
        facts: What else is worth keeping: digests of the first weights and batches, a traceback, ...
    """

    status: Status = "finished"
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    step_seconds: float | None = None
    state_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Any) -> Outcome:
        """What a function returned: an outcome, or metrics by name, with a curve where a value is a sequence.

        Raises:
            OptionError: for anything else.

        Example:
            >>> found = Outcome.of({"loss": [3.0, 2.0, 1.0], "accuracy": 0.9})
            >>> found.metrics, found.curves["loss"], found.steps
            ({'loss': 1.0, 'accuracy': 0.9}, ([1, 2, 3], [3.0, 2.0, 1.0]), 3)
        """
        if isinstance(found, Outcome):
            return found
        if not isinstance(found, Mapping):
            raise OptionError(f"run returned {shown(found)}, and not metrics by name, such as {{'loss': 0.1}}.")
        metrics: dict[str, float] = {}
        curves: dict[str, Curve] = {}
        for name, value in found.items():
            values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            if not values or not all(is_number(x) or x != x for x in values):
                raise OptionError(f"run returned {name}={shown(value)}, which is neither a number nor a list of them.")
            metrics[str(name)] = float(values[-1])
            if len(values) > 1:
                curves[str(name)] = (list(range(1, len(values) + 1)), [float(x) for x in values])
        steps = max((int(curve[0][-1]) for curve in curves.values()), default=0)
        return cls(metrics=metrics, curves=curves, steps=steps)

    @classmethod
    def crash(cls, error: BaseException, **facts: Any) -> Outcome:
        """The outcome of a run that raised an error."""
        kind = "" if isinstance(error, OptionError) else f"{type(error).__name__}: "
        text = first_line(error)
        reason = text if text == f"{type(error).__name__}." else kind + text
        return cls("crashed", reason, facts={**facts, "traceback": "".join(traceback.format_exception(error))})

    def failure(self, metric: str) -> str:
        """Why its value of a metric does not count; empty where it does.

        Example:
            >>> Outcome(metrics={"loss": float("nan")}).failure("loss")
            'loss is nan at the end.'
        """
        if self.status != "finished":
            return self.reason
        value = self.metrics.get(metric)
        if value is None:
            return f"{metric} was not logged."
        return "" if math.isfinite(value) else f"{metric} is {value} at the end."

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite as words, which JSON has no form for."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items() if value not in ("", None, {})}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        """The inverse of `as_json`."""
        known = {f.name for f in dataclasses.fields(cls)}
        given = {key: item for key, item in value.items() if key in known}
        given["metrics"] = {name: float(x) for name, x in given.get("metrics", {}).items()}
        curves = given.get("curves", {}).items()
        given["curves"] = {name: ([float(x) for x in xs], [float(y) for y in ys]) for name, (xs, ys) in curves}
        return cls(**given)


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """A curve of at most so many points, each the mean of neighbours, at the last of their steps.

    Example:
        >>> thinned(([1, 2, 3, 4], [4.0, 2.0, 1.0, 3.0]), 2)
        ([2, 4], [3.0, 2.0])
    """
    steps, values = curve
    size = math.ceil(len(steps) / most)
    if size <= 1:
        return curve
    chunks = [slice(i, i + size) for i in range(0, len(steps), size)]
    return [steps[chunk][-1] for chunk in chunks], [math.fsum(values[c]) / len(values[c]) for c in chunks]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
