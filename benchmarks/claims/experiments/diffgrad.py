"""Whether diffGrad oscillates less near optima than Adam, also than Adam at half the learning rate."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits
from benchmarks.claims.finding import Finding, higher, lower
from benchmarks.claims.models import memory, perceptron
from benchmarks.claims.plots import by_rate
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, evaluate, optimizer_of, outcome, train
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

DIFFGRAD, ADAM, HALF = "diffgrad", "adam", "adam at half the rate"
OPTIMIZERS = {DIFFGRAD: "diffgrad", ADAM: "adam", HALF: "adam"}
PAPER_LR = 0.1  # on the functions
NEAR = 0.05  # an iterate is at a minimum within this distance
SEEDS = 8


def first(x: Tensor) -> Tensor:
    """Two parabolas; the lower minimum is the left one, 0 at -0.3."""
    return torch.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def second(x: Tensor) -> Tensor:
    """A steep line, then a wave on a cubic."""
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * torch.sin(8 * x) + 0.85)


def third(x: Tensor) -> Tensor:
    """A parabola with a hill to either side of a sharp minimum, 0 at 0."""
    y = x.abs()
    return torch.where(y > 0.5, y**2, torch.where(y > 0.4, 0.75 - y, 7 * y / 8))


FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (first, second, third)


class Points(nn.Module):
    """A point on each of the three functions; elements do not see each other."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((len(FUNCTIONS),), start))

    def values(self) -> Tensor:
        return torch.stack([function(self.x[i]) for i, function in enumerate(FUNCTIONS)])


@dataclass(frozen=True)
class OnFunctions:
    """Minimizes the three functions of the paper from about -1, its start, with its first beta.

    The detour is the length of the path over the distance from its start to the lowest minimum, its geometric mean over
    functions. (Not to its own end: that would reward a path that leaves the minimum.)
    """

    steps: int
    beta1: float = 0.95

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        start = -1.1 + 0.2 * torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
        points = Points(start)
        optimizer = optimizer_of(points, {"name": candidate.spec["name"], "betas": (self.beta1, 0.999)}, lr)
        path = [points.x.detach().clone()]
        for _ in range(self.steps):
            optimizer.zero_grad()
            torch.autograd.backward(points.values().sum())
            optimizer.step()
            path.append(points.x.detach().clone())
        along = torch.stack(path)
        grid = torch.linspace(-1.2, 1.2, 24001)
        least = [function(grid) for function in FUNCTIONS]
        at = torch.stack([grid[values.argmin()] for values in least])
        loss = (points.values().detach() - torch.stack([values.min() for values in least])).mean().item()
        reached = ((along[-1] - at).abs() < NEAR).float().mean().item()
        length = along.diff(dim=0).abs().sum(0) / (along[0] - at).abs()
        curves = {}
        if seed == 0:  # for the picture
            every = range(0, self.steps + 1, 4)
            curves = {f"x{i + 1}": ([float(t) for t in every], along[::4, i].tolist()) for i in range(len(FUNCTIONS))}
        told = {"loss": loss, "reached": reached, "detour": length.log().mean().exp().item()}
        return Outcome(metrics=told, curves=curves)


@dataclass(frozen=True)
class OnDigits:
    """Trains a perceptron on digits at a constant learning rate.

    The detour is the length of the path of all weights in the last quarter, over the distance of its ends.
    """

    width: int
    steps: int
    batch: int = 50

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images, choose, test = digits()
        model = perceptron(self.width).to(DEVICE)
        path: list[Tensor] = []

        def keep(step: int) -> None:
            if step >= self.steps * 3 // 4:
                path.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

        optimizer = optimizer_of(model, {"name": candidate.spec["name"]}, lr)
        losses = train(model, optimizer, images.batches(self.batch, seed), self.steps, after=keep)
        held, (tested, right) = evaluate(model, choose.x, choose.y)[0], evaluate(model, test.x, test.y)
        longer = detour(path) if len(path) > 1 else 1.0
        told = {"loss": held, "test loss": tested, "test accuracy": right, "detour": longer}
        return Outcome(metrics=outcome(losses, self.steps, **told).metrics)


def detour(path: Sequence[Tensor]) -> float:
    """How many times longer a path is than the distance of its ends; 1 where it is straight."""
    length = sum((b - a).norm().item() for a, b in itertools.pairwise(path))
    distance = (path[-1] - path[0]).norm().item()
    return length / distance if length and distance else 1.0


def parts(size: Size) -> list[Part]:
    run = OnDigits(width=size.wide(32), steps=size.long(400, least=8))
    needed = memory(lambda: perceptron(run.width), activations=4 * run.batch * run.width)
    seeds, most = size.seeds(SEEDS), 10.0 if size.whole else 1.0
    rates = size.some((0.1, 0.3, 1.0, 3.0, most))
    functions = OnFunctions(steps=size.long(300, least=8))
    return [
        Part("functions", functions, arms(PAPER_LR), factors=size.some((0.1, 0.3, 1.0, 3.0)), seeds=seeds),
        Part("digits", run, arms(1e-2), factors=rates, seeds=seeds, bytes=needed),
        Part("tuned", run, arms(1e-2)[:2], factors=rates, seeds=seeds, tuning=2, extend=1, bytes=needed),
    ]


def arms(lr: float) -> list[Arm]:
    """diffGrad, Adam, and Adam at half of each rate, because friction alone takes up to half of a step."""
    return [Arm(name, lr / 2 if name == HALF else lr, {"name": of}) for name, of in OPTIMIZERS.items()]


def detours(found: Measured, arm: str) -> dict[int, float]:
    """The geometric mean of the detours at all learning rates, by seed."""
    columns = [found.values(arm, lr, "detour") for lr in found.rates(arm)]
    return {seed: statistics.geometric_mean(column[seed] for column in columns) for seed in columns[0]}


def judge(results: Results) -> list[Finding]:
    functions, trained, tuned = results["functions"], results["digits"], results["tuned"]
    own = max(rate for rate in functions.rates(DIFFGRAD) if rate <= PAPER_LR)
    at_own = {arm: functions.values(arm, own, "detour") for arm in (DIFFGRAD, ADAM)}
    over = {arm: detours(functions, arm) for arm in OPTIMIZERS}
    reached = {arm: functions.over_rates(arm, "reached") for arm in OPTIMIZERS}
    digit = {arm: detours(trained, arm) for arm in OPTIMIZERS}
    tested = {arm: tuned.values(arm, metric="test loss") for arm in (DIFFGRAD, ADAM)}
    on, both = "On the three functions", (DIFFGRAD, ADAM)
    unit, ends, halved = "times the distance to the minimum", "times the distance of its ends", (DIFFGRAD, HALF)
    shorter = f"{on}, at the paper's learning rate of {PAPER_LR:g}, diffGrad's path is less of a detour than Adam's."
    slower = f"{on}, over all learning rates, it is less of a detour than Adam's at half of each rate."
    more = f"{on}, it ends in the lowest minimum more often than Adam, over all learning rates."
    more_than_half = "It ends there more often than Adam at half of each rate."
    wandering = "On digits, in the last quarter, its path is less of a detour than that of Adam at half of each rate."
    better = "On digits, each at its best learning rate, diffGrad has a lower test loss than Adam."
    return [
        lower(shorter, at_own[DIFFGRAD], at_own[ADAM], unit, names=both, ratio=True),
        lower(slower, over[DIFFGRAD], over[HALF], unit, names=halved, ratio=True),
        higher(more, reached[DIFFGRAD], reached[ADAM], "of all", names=both),
        higher(more_than_half, reached[DIFFGRAD], reached[HALF], "of all", names=halved),
        lower(wandering, digit[DIFFGRAD], digit[HALF], ends, names=halved, ratio=True),
        lower(better, tested[DIFFGRAD], tested[ADAM], "nats", names=both),
    ]


def draw(results: Results) -> Any:
    functions, trained = results["functions"], results["digits"]
    figure, axes = new_figure(2, 2, 7.2, 5.6)
    for i, axis in enumerate(axes[:3]):
        for arm in OPTIMIZERS:
            rate = max(rate for rate in functions.rates(arm) if rate <= PAPER_LR)
            for steps, x in functions.curves(arm, f"x{i + 1}", rate):
                axis.plot(steps, x, label=f"{arm}, lr {rate:g}")
        axis.set(xlabel="step", ylabel="x", title=f"Function {i + 1}")
    axes[0].legend(fontsize=7)
    for arm in OPTIMIZERS:
        by_rate(axes[3], trained, arm, "detour")
    axes[3].set(yscale="log", ylabel="path over distance", title="Digits, last quarter of the steps")
    return figure


CLAIM = Claim(
    name="diffgrad",
    title="diffGrad damps oscillation near optima.",
    papers="Dubey et al. 2019, arXiv:1909.11015",
    setting=(
        "the three synthetic functions of the paper, 300 steps from about -1, 4 learning rates from 0.01 to 0.3; "
        "a perceptron of two hidden layers on digits, 400 steps, 5 learning rates from 0.001 to 0.1; 8 seeds"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims diffgrad --size large`: width 256, 4000 steps",
)
