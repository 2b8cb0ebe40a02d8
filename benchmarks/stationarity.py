"""Counts wrong verdicts of `lightning_optim.analysis.stationarity`: `python -m benchmarks.stationarity --seeds 100`.

Every process has an answer that is known. Size, curvatures, learning rate, noise, length and starting point are random.
The raw counts are in `benchmarks/results/stationarity.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.pages import RESULTS
from lightning_optim.analysis.stationarity import stationarity

APPROACHING, INVARIANT, MOVING = "approaching a stationary point", "invariant measure reached", "still moving"


class Draw:
    """Random settings of one case."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.size = (1, 2, 5, 20, 100)[seed % 5]
        curvatures = torch.exp(math.log(10) * torch.rand(self.size, generator=self.generator, dtype=torch.float64))
        self.curvature = curvatures / curvatures.max()
        self.steps = int(self.between(1000, 4000))
        self.start = self.normal(self.size) * self.between(0.5, 5)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def sgd(
        self, steps: int, rate: Callable[[int], float] | float, noise: float, start: Tensor, beta: float = 0.0
    ) -> Tensor:
        """Iterates of SGD on the quadratic, with momentum."""
        theta, momentum, found = start.clone(), torch.zeros_like(start), []
        for t in range(steps):
            found.append(theta)
            momentum = beta * momentum + self.curvature * theta
            momentum = momentum + noise * self.normal(self.size) if noise else momentum
            theta = theta - (rate(t) if callable(rate) else rate) * momentum
        return torch.stack(found)

    def stationary(self, start: str = "law", beta: float = 0.0) -> Tensor:
        """SGD with constant noise, over at least 120 of its longest relaxation times."""
        least = float(self.curvature.min())
        rate, noise = min(self.between(0.05, 0.5) / least, 1.5), self.between(0.1, 3)
        law = noise * (rate / (self.curvature * (2 - rate * self.curvature))).sqrt() * self.normal(self.size)
        first = {"law": law, "far": 20 * noise * self.start, "minimum": 0 * law}[start]
        rate = min(rate, 1.0) * (1 - beta)
        return self.sgd(max(self.steps, int(120 / (rate * least / (1 - beta)))), rate, noise, first, beta)


def two_cycle(draw: Draw) -> Tensor:
    signs = torch.ones(draw.steps, 1, dtype=torch.float64)
    signs[::2] = -1
    return signs * draw.start


def vanishing_noise(draw: Draw) -> Tensor:
    theta, found = draw.start, []
    for _ in range(draw.steps):
        found.append(theta)
        theta = theta - 0.5 * draw.curvature * theta * (1 + 0.5 * draw.normal(draw.size))
    return torch.stack(found)


def on_the_way(draw: Draw) -> Tensor:
    """Half a relaxation time to two of them, from far."""
    draw.curvature = torch.full_like(draw.curvature, draw.between(0.5, 2) / draw.steps)
    law = 0.3 * (1 / (2 * draw.curvature)).sqrt()
    return draw.sgd(draw.steps, 1.0, 0.3, draw.between(5, 30) * law)


def drift(draw: Draw, coordinates: int | None) -> Tensor:
    """4 to 40 standard deviations, over the whole run, in all directions or in one coordinate."""
    noise = draw.stationary()
    ramp = torch.linspace(0, 1, len(noise), dtype=torch.float64)[:, None]
    velocity = draw.normal(draw.size).sign() * draw.between(4, 40) * noise.std(0)
    if coordinates is not None:
        velocity[coordinates:] = 0
    return noise + ramp * velocity


def walk(draw: Draw, push: float) -> Tensor:
    return (draw.normal(draw.steps, draw.size) + push).cumsum(0)


def swelling(draw: Draw) -> Tensor:
    noise = draw.stationary()
    return noise * torch.linspace(1, 5, len(noise), dtype=torch.float64)[:, None]


class Process(NamedTuple):
    answer: str
    iterates: Callable[[Draw], Tensor]


PROCESSES = {
    "gradient descent": Process(APPROACHING, lambda d: d.sgd(d.steps, d.between(0.1, 1.5), 0, d.start)),
    "gradient descent, 200 steps": Process(APPROACHING, lambda d: d.sgd(200, d.between(0.3, 1.5), 0, d.start)),
    "heavy ball": Process(APPROACHING, lambda d: d.sgd(d.steps, d.between(0.05, 0.5), 0, d.start, 0.9)),
    "SGD whose noise vanishes at the minimum": Process(APPROACHING, vanishing_noise),
    "two-cycle of gradient descent": Process(INVARIANT, two_cycle),
    "SGD, from its stationary law": Process(INVARIANT, lambda d: d.stationary()),
    "SGD, from far": Process(INVARIANT, lambda d: d.stationary("far")),
    "SGD, from the minimum": Process(INVARIANT, lambda d: d.stationary("minimum")),
    "SGD with momentum 0.9": Process(INVARIANT, lambda d: d.stationary("law", 0.9)),
    "SGD, on the way from far": Process(MOVING, on_the_way),
    "a constant velocity": Process(MOVING, lambda d: torch.arange(d.steps).double()[:, None] * d.normal(d.size)),
    "a drift beside stationary noise": Process(MOVING, lambda d: drift(d, None)),
    "a drift of one coordinate": Process(MOVING, lambda d: drift(d, 1)),
    "a random walk": Process(MOVING, lambda d: walk(d, 0.0)),
    "a random walk with a drift": Process(MOVING, lambda d: walk(d, d.between(0.05, 1))),
    "noise that grows": Process(MOVING, swelling),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts = {}
    print("| process | answer | verdicts | wrong |\n| --- | --- | --- | --- |")
    for name, (answer, iterates) in PROCESSES.items():
        found: Counter[str] = Counter()
        for seed in range(given.seeds):
            draw = Draw(seed)
            theta = iterates(draw)
            units = 10.0 ** draw.between(-6, 6)
            losses = units * (draw.curvature * theta**2).sum(1)
            found[stationarity(theta, losses if seed % 2 else None).verdict] += 1
        counts[name] = dict(found)
        wrong = given.seeds - found[answer]
        others = ", ".join(f"{verdict} {count}" for verdict, count in found.items())
        print(f"| {name} | {answer} | {others} | {wrong} of {given.seeds} |", flush=True)
    (RESULTS / "stationarity.json").write_text(json.dumps({"seeds": given.seeds, "verdicts": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
