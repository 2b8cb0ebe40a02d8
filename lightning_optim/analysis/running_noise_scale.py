"""The gradient noise scale from measurements at many steps, each of them too noisy by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_optim.analysis.noise_scale import NoiseScale, ratio
from lightning_optim.errors import check, is_number


class RunningNoiseScale:
    """Exponential moving averages of tr(Sigma) and |G|^2, and the ratio of the two.

    The ratio of averages, never the average of ratios: a single |G|^2 may be near 0 or below. Both averages have the
    same weights, which sum to 1 from the first measurement on. Standard errors follow from the scatter of the
    measurements, so they also hold what changes during training.

    Args:
        decay: Weight of the past for one measurement, in [0, 1): 0.99 averages over about 100.

    Raises:
        OptionError: if decay is out of range.

    Example:
        >>> running = RunningNoiseScale(0.9)
        >>> for trace, signal in [(10.0, 2.0), (12.0, -1.0), (11.0, 2.0)]:
        ...     running.add(trace, signal)
        >>> print(running.value)
        10.99 ± 11 samples, not resolved: |G|^2 is within two standard errors of 0
    """

    def __init__(self, decay: float = 0.99) -> None:
        check("RunningNoiseScale", "decay", decay, is_number(decay) and 0 <= decay < 1, "in [0, 1)")
        self.decay = decay
        self.count = 0
        self._weight = self._squares = 0.0  # sum of the weights so far, and of their squares
        self._means = [0.0] * 5  # of trace, signal, their squares and their product

    def add(self, trace: float, signal: float) -> None:
        """Take in one measurement."""
        new = 1 - self.decay
        values = (trace, signal, trace * trace, signal * signal, trace * signal)
        self._means = [self.decay * mean + new * value for mean, value in zip(self._means, values, strict=True)]
        self._weight = self.decay * self._weight + new
        self._squares = self.decay**2 * self._squares + new**2
        self.count += 1

    @property
    def value(self) -> NoiseScale:
        """The estimate of now; without a measurement NaN."""
        if not self.count:
            return NoiseScale(math.nan, math.inf, math.nan, math.inf, math.nan, math.inf)
        trace, signal, tt, ss, ts = (mean / self._weight for mean in self._means)
        shares = self._squares / self._weight**2  # of the normalized weights, 1 / (effective number of measurements)
        if self.count == 1:
            return ratio(trace, signal, (math.inf, math.inf, math.inf))
        unbiased = shares / (1 - shares)
        of_trace, of_signal = (max(0.0, x) * unbiased for x in (tt - trace * trace, ss - signal * signal))
        return ratio(trace, signal, (of_trace, of_signal, (ts - trace * signal) * unbiased))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"count": self.count, "weight": self._weight, "squares": self._squares, "means": list(self._means)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.count, self._weight, self._squares = state["count"], state["weight"], state["squares"]
        self._means = list(state["means"])
