"""The schedules of learning rates by name: their options, and the factor on the learning rate at each step."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from lightning_optim.training.lengths import Length, Timeline, up
from lightning_optim.training.schedules import cosine, flat_linear, inverse_sqrt, linear

T = TypeVar("T")


def option(default: T, kind: str, about: str) -> T:
    """An option of a schedule: its default, what it may be (a key of `KINDS` of the reader), and what it means."""
    return field(default=default, metadata={"kind": kind, "about": about})


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A schedule with its options: after a linear warm-up a factor on the learning rate for each step.

    A subclass has `name`, options, and `after`.
    """

    name: ClassVar[str]
    by_progress: ClassVar[bool] = True  # whether the factor depends on the length of training, whatever the options

    warmup: Length = option(  # noqa: RUF009
        Length(0), "length", "length of the warm-up, over which the rate rises linearly"
    )

    def at(self, step: int, timeline: Timeline) -> float:
        """The factor after some steps."""
        warmup = timeline.whole(self.warmup)
        return (step + 1) / warmup if step < warmup else self.after(step, warmup, timeline)

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        """The factor after some steps, of which the first `warmup` are over."""
        raise NotImplementedError

    def momentum_at(self, step: int, timeline: Timeline) -> float | None:
        """The momentum after some steps, where the schedule sets that too."""
        return None

    def check(self) -> str:
        """What is wrong with options that do not go together; empty where nothing is."""
        return ""

    @property
    def title(self) -> str:
        """Its name for a reader."""
        return f"{self.name} after warm-up" if self.warmup.amount and self.name != "one_cycle" else self.name

    def lengths(self) -> list[Length]:
        """All lengths among its options."""
        values = [getattr(self, one.name) for one in fields(self)]
        return [one for value in values for one in (value if isinstance(value, tuple) else (value,)) if _is_length(one)]

    def needs_end(self) -> bool:
        """Whether it depends on the number of steps in the whole training."""
        return self.by_progress or any(length.unit == "fraction" for length in self.lengths())


def _is_length(value: Any) -> bool:
    return isinstance(value, Length)


def _progress(step: int, warmup: int, timeline: Timeline) -> float:
    """The fraction of training after the warm-up that is over."""
    return min((step - warmup) / max(timeline.total() - warmup, 1), 1.0)


@dataclass(frozen=True, kw_only=True)
class Constant(Shape):
    """The learning rate of the optimizer, after the warm-up."""

    name = "constant"
    by_progress = False

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(Shape):
    """A straight line to `final` at the end of training."""

    name = "linear"

    final: float = option(0.0, "factor", "last factor on the learning rate")

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        return linear(_progress(step, warmup, timeline), self.final)


@dataclass(frozen=True, kw_only=True)
class Cosine(Shape):
    """Half a cosine to `final` at the end of training."""

    name = "cosine"

    final: float = option(0.0, "factor", "last factor on the learning rate")

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        return cosine(_progress(step, warmup, timeline), self.final)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Shape):
    """1 / sqrt(1 + t / `timescale`), t steps after the warm-up."""

    name = "inverse_sqrt"
    by_progress = False

    final: float = option(0.0, "factor", "least factor on the learning rate")
    timescale: Length = option(  # noqa: RUF009
        Length(0.01, "fraction"), "duration", "after this length the factor is 1 / sqrt(2)"
    )

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        if self.timescale.unit == "fraction":
            return inverse_sqrt(_progress(step, warmup, timeline), self.final, self.timescale.amount)
        return inverse_sqrt(step - warmup, self.final, timeline.steps(self.timescale))


@dataclass(frozen=True, kw_only=True)
class FlatLinear(Shape):
    """Constant, and then a straight line to `final` over the last part of training."""

    name = "flat_linear"

    final: float = option(0.0, "factor", "last factor on the learning rate")
    decay_fraction: float = option(0.2, "fraction", "fraction of training, at its end, over which the rate falls")

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        return flat_linear(_progress(step, warmup, timeline), self.final, self.decay_fraction)


@dataclass(frozen=True, kw_only=True)
class Step(Shape):
    """Multiplies the rate by `gamma` after each `every`, counted from the start of training. torch: StepLR."""

    name = "step"
    by_progress = False

    every: Length = option(Length(0.3, "fraction"), "duration", "length between two changes")  # noqa: RUF009
    gamma: float = option(0.1, "gamma", "factor of each change")
    final: float = option(0.0, "factor", "least factor on the learning rate")

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        def moment(count: int) -> int:
            return up(timeline.steps(Length(count * self.every.amount, self.every.unit)))

        changes = bisect.bisect_right(range(1, step + 1), step, key=moment)
        return _bounded(self.gamma**changes, self.final)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Shape):
    """Multiplies the rate by `gamma` at each milestone, counted from the start of training. torch: MultiStepLR."""

    name = "multi_step"
    by_progress = False

    milestones: tuple[Length, ...] = option(
        (Length(0.5, "fraction"), Length(0.75, "fraction")), "milestones", "moments of the changes"
    )
    gamma: float = option(0.1, "gamma", "factor of each change")
    final: float = option(0.0, "factor", "least factor on the learning rate")

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        changes = sum(step >= timeline.whole(milestone) for milestone in self.milestones)
        return _bounded(self.gamma**changes, self.final)


@dataclass(frozen=True, kw_only=True)
class Exponential(Shape):
    """Falls by the same factor in equal times: to `final` at the end of training, or by `gamma` in each `every`.

    torch's ExponentialLR at the ends of epochs, and smooth between them.
    """

    name = "exponential"
    by_progress = False

    gamma: float | None = option(None, "gamma or null", "factor for each `every`; default: what leads to `final`")
    every: Length | None = option(  # noqa: RUF009
        None, "duration or null", "length over which the rate falls by `gamma`; default: 1 epoch"
    )
    final: float | None = option(
        None,
        "factor or null",
        "last factor on the learning rate, 0.01 by default; with `gamma` the least, 0 by default",
    )

    def check(self) -> str:
        if self.gamma is None and self.every is not None:
            return f"every={self.every} needs gamma, the factor in that time."
        return (
            "final=0 is never reached. Set a final above 0, or gamma." if self.gamma is None and self.final == 0 else ""
        )

    def needs_end(self) -> bool:
        return self.gamma is None or super().needs_end()

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        if self.gamma is None:
            return float((0.01 if self.final is None else self.final) ** _progress(step, warmup, timeline))
        every = timeline.steps(self.every or Length(1, "epochs"), warmup)
        return _bounded(self.gamma ** ((step - warmup) / every), self.final or 0.0)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Shape):
    """Rises from `start` to the rate of the optimizer over the warm-up, and falls to `final`. torch: OneCycleLR.

    Smith & Topin 2017, arXiv:1708.07120. With `momentum` it cycles the momentum, or the first of `betas`, against the
    learning rate, as torch does by default.
    """

    name = "one_cycle"

    warmup: Length = option(Length(0.3, "fraction"), "length", "length of the rise")  # noqa: RUF009
    start: float = option(0.04, "factor", "first factor on the learning rate")
    final: float = option(4e-6, "factor", "last factor on the learning rate")
    anneal: str = option("cos", "cos/linear", "shape of rise and fall")
    three_phase: bool = option(False, "flag", "whether to fall to `start` as fast as it rose, and then to `final`")
    momentum: tuple[float, float] | None = option(
        None, "momentum", "least and largest momentum; null leaves it as it is"
    )

    def at(self, step: int, timeline: Timeline) -> float:
        return (
            self.start
            if step == 0 and self.warmup.amount
            else self._between(step, timeline, self.start, 1.0, self.final)
        )

    def momentum_at(self, step: int, timeline: Timeline) -> float | None:
        if self.momentum is None:
            return None
        low, high = self.momentum
        return high if step == 0 and self.warmup.amount else self._between(step, timeline, high, low, high)

    def _between(self, step: int, timeline: Timeline, start: float, peak: float, final: float) -> float:
        total, rise = timeline.total(), timeline.steps(self.warmup)
        ends, values = [rise - 1, total - 1], [start, peak, final]
        if self.three_phase:
            ends, values = [rise - 1, 2 * rise - 2, total - 1], [start, peak, start, final]
        phase = next((i for i, end in enumerate(ends) if step <= end), len(ends) - 1)
        begin, end, one, other = [0.0, *ends][phase], ends[phase], values[phase], values[phase + 1]
        done = min((step - begin) / (end - begin), 1.0) if end > begin else 1.0
        return other + (one - other) * cosine(done, 0.0) if self.anneal == "cos" else one + (other - one) * done


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Shape):
    """Half a cosine to `final` again and again. torch: CosineAnnealingWarmRestarts; SGDR, arXiv:1608.03983."""

    name = "cosine_restarts"
    by_progress = False

    cycle: Length = option(Length(0.25, "fraction"), "duration", "length of the first cycle")  # noqa: RUF009
    multiplier: float = option(1.0, "multiplier", "length of each cycle, relative to the one before")
    final: float = option(0.0, "factor", "last factor of each cycle")

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        length, elapsed = timeline.steps(self.cycle, warmup), float(step - warmup)
        if self.multiplier == 1:
            elapsed -= length * math.floor(elapsed / length * (1 + 1e-12))
        else:
            while elapsed >= length * (1 - 1e-12):
                elapsed, length = elapsed - length, length * self.multiplier
        return cosine(max(elapsed, 0.0) / length, self.final)


@dataclass(frozen=True, kw_only=True)
class Plateau(Shape):
    """Multiplies the rate by `factor` when a metric no longer improves. torch: ReduceLROnPlateau."""

    name = "plateau"
    by_progress = False

    monitor: str = option("", "metric", "name of the metric, as the module logs it; required")
    mode: str = option("min", "min/max", "whether small or large values of the metric are good")
    factor: float = option(0.1, "reduction", "factor of each change")
    patience: int = option(10, "count", "number of values without improvement after which the rate falls")
    threshold: float = option(1e-4, "factor", "least change of the metric that is an improvement")
    threshold_mode: str = option("rel", "rel/abs", "whether `threshold` is relative to the best value")
    cooldown: int = option(0, "count", "number of values after a change that do not count as bad")
    final: float = option(0.0, "factor", "least factor on the learning rate")
    interval: str = option("epoch", "epoch/step", "when the metric is read: after epochs, or after steps")
    frequency: int = option(1, "frequency", "it is read after so many of these")

    def after(self, step: int, warmup: int, timeline: Timeline) -> float:
        return 1.0


def _bounded(factor: float, final: float) -> float:
    """At least `final`, where the factor falls."""
    return max(factor, final) if factor < 1 else factor


SHAPES: dict[str, type[Shape]] = {
    cls.name: cls
    for cls in (
        *(Constant, Linear, Cosine, InverseSqrt, FlatLinear, Step, MultiStep, Exponential, OneCycle),
        *(CosineRestarts, Plateau),
    )
}


def options_of(shape: type[Shape]) -> dict[str, Any]:
    """The options of a schedule: the fields of its class by name."""
    return {one.name: one for one in fields(shape)}
