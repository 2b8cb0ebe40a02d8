"""The trajectory of the parameters while they are trained, as windows of block means of a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.analysis.block_means import LEAST_CHANGE, Change, Window, drift, trend, wanders, within_block
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.distributed.placement import shard_of
from lightning_optim.distributed.ranks import mean_over_ranks

BLOCKS = 32  # in a window
SKETCHES = 16  # random projections
CHUNK = 2**20  # elements that are converted to float64 at a time
TENSORS = ("means", "squares", "points", "movement")


class Trajectory:
    """Divides training into windows, and looks at some steps of each.

    A look takes sixteen random projections, the length of the step, and the mean loss since the last look, with one
    message of 36 numbers. A projection sums the elements of every sixteenth index with random signs.

    Held: the parameters at the beginning of the window and the displacement of the window before, one byte for each
    element, and during a step that is looked at a copy from before it; all sharded as the parameters are.

    Args:
        params: The parameters.
        window: Steps in a window, at least 32.
        samples: Steps that are looked at in a window, at least 32.
        seed: Of the projections.

    Attributes:
        steps: Length of a window in steps: `window`, rounded down to equal blocks.
        zero: The first values of the series, from which they are counted; a checkpoint needs it beside the windows.
    """

    def __init__(self, params: Sequence[Tensor], window: int, samples: int, seed: int = 0) -> None:
        self.space = Vectors(params)
        self._in_block = max(1, min(samples, window) // BLOCKS)
        self._stride = max(1, window // (BLOCKS * self._in_block))
        self.steps = BLOCKS * self._in_block * self._stride
        buckets = [_buckets(p) for p in params]
        self._codes = (self.space.flat(buckets) + SKETCHES * (self.space.random(seed, signs=True) > 0)).byte()
        self.zero: Tensor | None = None
        self._start = self.space.flat(params)
        self._direction: Tensor | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a window."""
        self._done = 0  # steps
        self._values: list[Tensor] = []  # of each look
        self._losses: list[Tensor] = []  # since the last look
        self._before: Tensor | None = None

    def before_step(self) -> None:
        """Keep the parameters, if the next step is one to look at. More than one call before a step does no harm."""
        if self._before is None and self._done % self._stride == self._stride - 1:
            self._before = self.space.flat(self.space.params)

    def add_loss(self, loss: Tensor | None) -> None:
        """Take in the loss of a batch."""
        if loss is not None:
            self._losses.append(loss.detach().double().reshape(()))

    def after_step(self) -> tuple[Window, list[Change]] | None:
        """Take in a step. At the end of a window return it, with the drift along the displacement before it."""
        self._done += 1
        if self._before is not None:
            self._values.append(self._look(self._before))
            self._before = None
        if self._done < self.steps:
            return None
        found = self._window()
        self.begin()
        return found

    @torch.no_grad()
    def _look(self, before: Tensor) -> Tensor:
        """Projections, drift, squared length of the step and loss, (19,) float64 on the CPU."""
        now = self.space.flat(self.space.params)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        found = torch.zeros(2 * SKETCHES + 4, dtype=torch.float64, device=now.device)
        for groups, low, high in self.space.ranges:
            share = math.prod(dist.get_world_size(group) for group in groups) / ranks
            for start in range(low, high, CHUNK):
                part = slice(start, min(high, start + CHUNK))
                x = now[part].double()
                found[: 2 * SKETCHES] += share * torch.bincount(self._codes[part].int(), x, 2 * SKETCHES)
                found[-4] += share * (x - before[part].double()).square().sum()
                if self._direction is not None:
                    found[-3] += share * (x @ self._direction[part].double())
        if self._losses:
            found[-2] = torch.stack(self._losses).mean().to(found.device) / ranks
        found[-1] = float(not self._losses) / ranks
        self._losses = []
        found = (mean_over_ranks(found) * ranks).cpu()
        loss = found[-2] if found[-1] == 0 else torch.full_like(found[-2], math.nan)
        sketches = found[SKETCHES : 2 * SKETCHES] - found[:SKETCHES]
        return torch.cat([sketches, found[-4:-2], loss[None]])

    @torch.no_grad()
    def _window(self) -> tuple[Window, list[Change]]:
        values = torch.stack(self._values)
        series = torch.cat([values[:, :SKETCHES], values[:, -1:]], 1)
        if self.zero is None:
            self.zero = series[0].nan_to_num()
        blocks = (series - self.zero).view(BLOCKS, self._in_block, -1)
        lengths = values[:, SKETCHES].sqrt()
        now = self.space.flat(self.space.params)
        size = self.space.norm(now)
        going_on = _drift(values[:, SKETCHES + 1], self._in_block) if self._direction is not None else []
        self._direction, self._start = now - self._start, now
        return Window(
            means=blocks.mean(1),
            squares=blocks.square().mean(1),
            points=blocks[torch.arange(BLOCKS, dtype=torch.int64, device="cpu"), within_block(BLOCKS, self._in_block)],
            movement=lengths.square().view(BLOCKS, -1).mean(1),
            shrinking=float((lengths[1:] < lengths[:-1]).double().mean()),
            displacement=self.space.norm(self._direction),
            path=float(lengths.mean()) * self.steps,
            size=size,
        ), going_on


def _buckets(p: Tensor) -> Tensor:
    """Which projection each local element belongs to, by its index in the whole parameter."""
    shard = shard_of(p)
    return (shard.global_indices(p.device) % SKETCHES).float()


def _drift(along: Tensor, in_block: int) -> list[Change]:
    """Whether the parameters have gone on in the direction of the window before."""
    means = along.view(BLOCKS, in_block).mean(1)
    slope, p = drift(means) if wanders(means) else trend(means)
    sd = float(along.std())
    return [Change(-1, "mean", slope * BLOCKS / sd, p)] if sd > 0 and abs(slope) * BLOCKS > LEAST_CHANGE * sd else []


def without_loss(window: Window) -> Window:
    """The window without its last series."""
    kept = vars(window) | {name: getattr(window, name)[:, :-1] for name in TENSORS[:3]}
    return Window(**kept)


def to_state(window: Window | None) -> dict[str, Any] | None:
    """A window as plain tensors and floats, for a checkpoint."""
    return None if window is None else dict(vars(window))


def from_state(state: Mapping[str, Any] | None) -> Window | None:
    """The window of `to_state`."""
    return None if state is None else Window(**state)
