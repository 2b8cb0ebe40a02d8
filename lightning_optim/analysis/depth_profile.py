"""Gradient norms and the size of the residual stream by depth, and what they say of the place of layer norms.

Xiong et al. 2020, arXiv:2002.04745: at initialization the gradient of the last feed-forward matrix does not fall with
the depth where norms follow the sums (Post-LN), and falls as 1/sqrt(depth) where they stand before the branches
(Pre-LN), whose residual stream grows linearly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FALLS = 0.8  # a fitted ratio of the last to the first gradient norm under which norms fall
GROWS = 0.2  # a fitted change of the residual stream, relative to its mean, over which it grows
FEW = 4  # blocks, under which gradient norms do not tell one pattern from the other
WORDS = {
    "block": "the gradient norm of the block",
    "attention_output": "the gradient norm of the attention output",
    "feed_forward_output": "the gradient norm of the feed-forward output",
}
Pattern = Literal["pre", "post", "neither", "unknown"]
MEANING: dict[Pattern, str] = {
    "pre": "the pattern of Pre-LN, which trains without a warm-up",
    "post": "the pattern of Post-LN, which at depth needs a warm-up of the learning rate (warmup_steps of a schedule, "
    "or WarmupFreeSchedule) or another initialization (GradInit)",
    "neither": "neither the pattern of Pre-LN nor that of Post-LN",
    "unknown": "no verdict, for it takes gradient norms and residual norms of two blocks at least",
}


@dataclass(frozen=True)
class DepthProfile:
    """What one look at a stack of blocks has seen.

    Attributes:
        step: The number of optimizer steps before it.
        stack: The name of the stack.
        names: The name of each block, by depth.
        norms: By part ("block", "attention_output", "feed_forward_output") the gradient norm in each block, in units
            of the loss per unit of the parameters; NaN where nothing is trained.
        residual: The mean square of an element of what each block returns, |x|²/d; empty if it was not seen.
    """

    step: int
    stack: str
    names: tuple[str, ...]
    norms: Mapping[str, tuple[float, ...]]
    residual: tuple[float, ...] = ()

    @property
    def part(self) -> str:
        """The part by which to judge: the feed-forward output where it is known, as in the paper, or the block."""
        known = any(map(_positive, self.norms.get("feed_forward_output", ())))
        return "feed_forward_output" if known else "block"

    def slope(self, part: str) -> float:
        """The least-squares slope of the logarithm of the norm, per block; NaN for fewer than two blocks."""
        points = [(level, math.log(norm)) for level, norm in enumerate(self.norms[part]) if _positive(norm)]
        return _slope(points)

    def last_over_first(self, part: str) -> float:
        """The norm in the last block by that in the first, of those that have one."""
        norms = [norm for norm in self.norms[part] if _positive(norm)]
        return norms[-1] / norms[0] if norms else math.nan

    def growth(self) -> float:
        """The least-squares slope of the residual size, per block; NaN where it is not known."""
        return _slope([(level, size) for level, size in enumerate(self.residual) if math.isfinite(size)])

    def pattern(self) -> Pattern:
        """Which arrangement of layer norms this looks like.

        A ratio of norms alone does not tell on shallow networks, so with fewer than 4 blocks the residual decides.

        Example:
            >>> names, falling = tuple("abcdef"), (1.0, 0.8, 0.7, 0.6, 0.5, 0.4)
            >>> DepthProfile(0, "", names, {"block": falling}, (1.6, 2.3, 3.2, 4.0, 5.1, 5.9)).pattern()
            'pre'
            >>> DepthProfile(0, "", names, {"block": falling[::-1]}, (1.0,) * 6).pattern()
            'post'
        """
        levels = len(self.names) - 1
        slope, change = self.slope(self.part), self._change()
        if not levels or math.isnan(slope) or math.isnan(change):
            return "unknown"
        few = len(self.names) < FEW
        falls = math.exp(slope * levels) < FALLS
        if change > GROWS and (falls or few):
            return "pre"
        if abs(change) <= GROWS and (few or not falls):
            return "post"
        return "neither"

    def verdict(self) -> str:
        """What was seen and what it means, in a sentence."""
        part, levels = self.part, len(self.names) - 1
        slope, change = self.slope(part), self._change()
        words = f"{WORDS[part]} "
        if math.isnan(slope):
            words += "is unknown"
        else:
            fitted = math.exp(slope * levels)
            moves = "falls towards the output" if fitted < FALLS else "is flat"
            moves = "rises towards the output" if fitted > 1 / FALLS else moves
            words += f"{moves} (last/first {self.last_over_first(part):.3g}, slope of its logarithm {slope:+.2g})"
        if not math.isnan(change):
            sizes = self._sizes()
            moves = "grows" if change > GROWS else "shrinks" if change < -GROWS else "is constant"
            words += f", and the residual norm |x|²/d {moves} ({sizes[0]:.3g} to {sizes[-1]:.3g})"
        few = " With fewer than 4 blocks the residual alone decides." if 0 < levels < FEW - 1 else ""
        return f"{words}: {MEANING[self.pattern()]}.{few}"

    def _sizes(self) -> list[float]:
        return [size for size in self.residual if math.isfinite(size)]

    def _change(self) -> float:
        """The fitted change of the residual size over all blocks, relative to its mean; NaN where it is not known."""
        sizes = self._sizes()
        mean = sum(sizes) / len(sizes) if sizes else math.nan
        return self.growth() * (len(self.names) - 1) / max(mean, 1e-300)

    def as_plain(self) -> dict[str, Any]:
        """Numbers, words, lists and dicts, for a checkpoint."""
        plain = asdict(self)
        return {**plain, "names": list(self.names), "norms": {k: list(v) for k, v in self.norms.items()}} | {
            "residual": list(self.residual)
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> DepthProfile:
        """The profile that `as_plain` wrote."""
        norms = {part: tuple(values) for part, values in plain["norms"].items()}
        return cls(plain["step"], plain["stack"], tuple(plain["names"]), norms, tuple(plain["residual"]))


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line; NaN for fewer than two points."""
    if len(points) < 2:
        return math.nan
    x0 = sum(x for x, _ in points) / len(points)
    return sum((x - x0) * y for x, y in points) / sum((x - x0) ** 2 for x, _ in points)
