"""Whether moment estimation adapts to noise that changes, better than the best fixed step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits
from benchmarks.claims.finding import Finding, alike, lower
from benchmarks.claims.models import CLASSES, convolutional, memory
from benchmarks.claims.plots import by_step
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, evaluate, optimizer_of, spec_without, train
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome, thinned

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
NOISE = 0.3  # the root mean square of the noise of an element, in all kinds
MARGIN, KNOWN_MARGIN, NATS = math.log(1.1), math.log(1.25), 0.05
FIXED, MOMENTS, KNOWN = "fixed step", "moment estimation", "known noise"
TIMES = 10


@dataclass(frozen=True)
class Quadratic:
    """Minimizes ½ Σ λ x², with curvatures λ from 0.1 to 1, from x = 1, under noise whose level changes over 100 times.

    The level is constant, goes up and down twice ("slow"), is another after each eighth of the run ("jumps") or in
    each step ("each step"). "loss" is the mean over all steps of what the loss is above its least; where that is more
    than at the start, it is that of the start. A candidate that is `known` gets the level: its rate is divided by it.
    """

    kind: Literal["constant", "slow", "jumps", "each step"]
    steps: int
    size: int = 50

    def levels(self, seed: int) -> list[float]:
        """The standard deviation of an element's noise in each step, with `NOISE` for its root mean square."""
        generator = torch.Generator().manual_seed(seed)
        random = (2 * torch.rand(self.steps, generator=generator) - 1).tolist()
        exponents = {
            "constant": [0.0] * self.steps,
            "slow": [math.sin(4 * math.pi * step / self.steps) for step in range(self.steps)],
            "jumps": [random[8 * step // self.steps] for step in range(self.steps)],
            "each step": random,
        }[self.kind]
        levels = [10**exponent for exponent in exponents]
        mean = math.sqrt(statistics.fmean(level**2 for level in levels))
        return [NOISE * level / mean for level in levels]

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        spec = spec_without(candidate, "known")
        levels, curvatures = self.levels(seed), torch.logspace(-1, 0, self.size)
        generator = torch.Generator().manual_seed(seed + 1)
        x: Any = nn.Parameter(torch.ones(self.size))
        optimizer = optimizer_of(nn.ParameterList([x]), {**spec, "weight_decay": 0.0}, lr)
        start = 0.5 * curvatures.sum().item()
        losses: list[float] = []
        for level in levels:
            at = x.detach()
            losses.append(0.5 * (curvatures * at * at).sum().item())
            if not losses[-1] < 1e3 * start:
                break
            x.grad = curvatures * at + level * torch.randn(self.size, generator=generator)
            if candidate.spec.get("known"):
                optimizer.param_groups[0]["lr"] = lr * NOISE / level
            optimizer.step()
        loss = min(statistics.fmean(losses), start) if len(losses) == self.steps else start
        steps = [float(step + 1) for step in range(len(losses))]
        return Outcome(metrics={"loss": loss}, curves={"loss": thinned((steps, [min(f, start) for f in losses]), 40)})


@dataclass(frozen=True)
class Digits:
    """Trains a convolutional net on digits, of which noise in the gradient changes every `every` steps.

    By turns all or none of nine labels in ten are drawn by lot ("labels"), or a batch has 2 or 64 images ("batches").
    "constant" has as many wrong labels all the time. "loss" and "test loss" are means over `TIMES` times of the run.
    """

    kind: Literal["labels", "batches", "constant"]
    width: int
    steps: int
    every: int = 50

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without an end."""
        images, generator = digits()[0], torch.Generator().manual_seed(seed)
        large, small, medium = (images.batches(size, seed) for size in (64, 2, 32))
        step = 0
        while True:
            noisy = step // self.every % 2
            if self.kind == "batches":
                yield next(small if noisy else large)
            else:
                x, y = next(medium)
                wrong = torch.rand(len(y), generator=generator) < (0.45 if self.kind == "constant" else 0.9 * noisy)
                yield x, torch.where(wrong, torch.randint(CLASSES, y.shape, generator=generator), y)
            step += 1

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        _, choose, test = digits()
        model = convolutional(self.width).to(DEVICE)
        optimizer = optimizer_of(model, {**candidate.spec, "weight_decay": 0.0}, lr)
        every = max(1, self.steps // TIMES)
        held: list[float] = []
        tested: list[float] = []

        def after(step: int) -> None:
            if (step + 1) % every == 0:
                held.append(evaluate(model, choose.x, choose.y)[0])
                tested.append(evaluate(model, test.x, test.y)[0])

        train(model, optimizer, self.batches(seed), self.steps, after=after)
        for values in (held, tested):
            values += [math.log(CLASSES)] * (self.steps // every - len(values))  # of a run that has diverged
        times = [float(every * (i + 1)) for i in range(len(tested))]
        metrics = {"loss": statistics.fmean(held), "test loss": statistics.fmean(tested)}
        return Outcome(metrics=metrics, curves={"test loss": (times, tested)})


def parts(size: Size) -> list[Part]:
    sgd = {"name": "sgd"}, {"momentum": (0.0, 0.9)}
    moments = {"name": "moment_estimation_sgd"}, {"beta": (0.9, 0.99)}
    known = Arm(KNOWN, 0.03, {**sgd[0], "known": True}, {"momentum": (0.0, 0.9)})
    terms: dict[str, Any] = {"factors": size.some(FACTORS), "seeds": size.seeds(8), "extend": 2 * size.whole}
    found = []
    for kind in ("constant", "slow", "jumps", "each step"):
        arms = [Arm(FIXED, 0.03, *sgd), Arm(MOMENTS, 0.1, *moments), *([known] if kind == "slow" else [])]
        run = Quadratic(kind, size.long(4000, least=16), size.wide(50))
        found.append(Part(f"quadratic, {kind}", run, arms, tuning=1 + size.whole, **terms))
    needed = memory(lambda: convolutional(size.wide(8)), activations=64 * 64 * 8 * size.wide(8))
    for data in ("labels", "batches", "constant"):
        arms = [Arm(FIXED, 0.03, *sgd), Arm(MOMENTS, 0.1, *moments)]
        run_digits = Digits(data, size.wide(8), size.long(600))
        found.append(Part(f"digits, {data}", run_digits, arms, tuning=1, bytes=needed, **terms))
    return found


def _logs(found: Measured, arm: str) -> dict[int, float]:
    return {seed: math.log(value) for seed, value in found.values(arm).items()}


def judge(results: Results) -> list[Finding]:
    names = MOMENTS, FIXED

    def less(part: str, statement: str, metric: str) -> Finding:
        one, two = (results[part].values(arm, metric=metric) for arm in names)
        return lower(statement, one, two, names=names, ratio=True)

    def same(part: str, statement: str, other: str = FIXED, margin: float = MARGIN) -> Finding:
        one, two = _logs(results[part], MOMENTS), _logs(results[part], other)
        return alike(statement, one, two, margin, "log loss", names=(MOMENTS, other))

    one, two = (results["digits, constant"].values(arm, metric="test loss") for arm in names)
    return [
        less("quadratic, slow", "Where noise changes slowly it loses less than the best fixed step.", "loss"),
        less("quadratic, jumps", "So it does where noise jumps.", "loss"),
        same("quadratic, constant", "Where noise is constant it loses as much, within 10 %."),
        same("quadratic, each step", "So it does where the level cannot be foreseen, new in each step."),
        same("quadratic, slow", "It loses as much as if it knew the noise, within 25 %.", KNOWN, KNOWN_MARGIN),
        less("digits, labels", "On digits it loses less, where wrong labels come and go.", "test loss"),
        less("digits, batches", "So it does where batches of 64 and of 2 take turns.", "test loss"),
        alike("Where wrong labels are as many at all times, it loses as much.", one, two, NATS, "nats", names=names),
    ]


def draw(results: Results) -> Any:
    figure, axes = new_figure(2, 2, 8, 6)
    for at, part in zip(
        axes, ("quadratic, slow", "quadratic, constant", "digits, labels", "digits, constant"), strict=True
    ):
        curve = "loss" if part.startswith("quadratic") else "test loss"
        for arm in results[part].part.arms:
            by_step(at, results[part], arm.name, curve)
        at.set(ylabel=f"{curve}{'' if curve == 'loss' else ', nats'}", title=part)
        if curve == "loss":
            at.set(yscale="log")
    axes[0].legend(fontsize=8)
    return figure


CLAIM = Claim(
    name="moment_estimation",
    title="Moment estimation adapts to noise that changes.",
    papers="Zhang et al. 2022, PMLR 162:26347",
    setting="a quadratic with 50 unknowns and noise over a range of 100, 4000 steps, and a convolutional net on "
    "digits, 600 steps; at least 5 rates by 2 momenta (fixed step) or 2 β (moment estimation), 8 seeds",
    parts=parts,
    judge=judge,
    draw=draw,
)
