"""Whether an average of iterates beats the last one, how often is enough, and Gadam and GadamX."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits
from benchmarks.claims.finding import Finding, alike, higher, lower
from benchmarks.claims.models import convolutional, memory
from benchmarks.claims.plots import COLOURS
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, train
from benchmarks.pictures import new_figure
from lightning_optim import WeightAverage
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

FACTORS = (0.3, 1.0, 3.0)
GRID_SEEDS, SEEDS = 5, 8
EPOCHS, EPOCH = 25, 31  # an epoch of 1000 images takes 31 steps of 32
OFTEN, SELDOM = "step", "epoch"  # when iterates are collected
START = 0.5  # share of the run after which iterates are collected
MARGIN = 0.03  # of log losses: a difference of 3 % does not matter
SHRINK = (0.0, 2.5e-4, 2.5e-3)  # the share by which a step at the middle of the grid shrinks weights


def falling(share: float) -> float:
    """The factor on the learning rate in the paper: 1, then along a line to 1/2, where it stays during the average."""
    way = (share / START - 0.5) / 0.4
    return 1 - 0.5 * min(1.0, max(0.0, way))


@dataclass(frozen=True)
class Digits:
    """Trains a convolutional net: with `every` at the rates of the paper and averaged, else along a cosine."""

    width: int
    epochs: int
    epoch: int
    batch: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images, choose, test = (split.to(DEVICE) for split in digits())
        model = convolutional(self.width).to(DEVICE)
        spec = dict(candidate.spec)
        every = {OFTEN: 1, SELDOM: self.epoch, None: 0}[spec.pop("every", None)]
        optimizer, steps = optimizer_of(model, spec, lr), self.epochs * self.epoch
        start = self.epoch * (round(START * self.epochs) + 1)  # so that the last collection is at the end
        average = WeightAverage(optimizer, start=start, every=every) if every else None
        batches = images.batches(self.batch, seed)
        losses = train(model, optimizer, batches, steps, lr_at=falling if every else cosine)
        last, last_right = evaluate(model, test.x, test.y)
        if average is None or len(losses) < steps:
            held, (tested, right) = evaluate(model, choose.x, choose.y)[0], (last, last_right)
        else:
            with average.applied(model):
                held, (tested, right) = evaluate(model, choose.x, choose.y)[0], evaluate(model, test.x, test.y)
        told = {"loss": held, "test loss": tested, "test error": 1 - right}
        told |= {"last test loss": last, "last test error": 1 - last_right}
        return replace(outcome(losses, steps, **told), curves={})


def decays(lr: float, size: Size) -> tuple[float, ...]:
    """The weight decays by which a step at a learning rate shrinks weights by `SHRINK`."""
    return size.some([float(f"{shrink / lr:.3g}") for shrink in SHRINK])


def parts(size: Size) -> list[Part]:
    run = Digits(size.wide(8), size.long(EPOCHS, 2), EPOCH if size.whole else 2)
    sgd, padam = {"name": "sgd", "momentum": 0.9}, {"name": "padam", "partial": 0.125, "decoupled": True}
    often = {"weight_decay": decays(9e-3, size), "every": size.some((OFTEN, SELDOM))}
    arms = [
        Arm("SGD, cosine", 0.1, sgd, {"weight_decay": decays(1.0, size)}),  # momentum makes steps ten times as long
        Arm("SGD, averaged", 0.1, {**sgd, "every": SELDOM}, {"weight_decay": decays(1.0, size)}),
        Arm("AdamW, cosine", 9e-3, {"name": "adamw"}, {"weight_decay": decays(9e-3, size)}),
        Arm("Gadam", 9e-3, {"name": "adamw", "every": SELDOM}, {"weight_decay": decays(9e-3, size)}),
        Arm("GadamX", 0.3, {**padam, "every": SELDOM}, {"weight_decay": decays(0.3, size)}),
    ]
    needed = memory(lambda: convolutional(run.width), activations=1000 * 32 * 3 * run.width)
    terms: dict[str, Any] = {"factors": size.some(FACTORS), "bytes": needed}
    return [
        Part("grid", run, [Arm("AdamW", 9e-3, {"name": "adamw"}, often)], seeds=size.seeds(GRID_SEEDS), **terms),
        Part("best", run, arms, seeds=size.seeds(SEEDS), tuning=size.seeds(2), extend=1, **terms),
    ]


def gain(grid: Measured, lr: float, **options: Any) -> dict[int, float]:
    """By how much the test loss of the average is below that of the last iterate, as a logarithm, by seed."""
    averaged = grid.values("AdamW", lr, "test loss", every=SELDOM, **options)
    last = grid.values("AdamW", lr, "last test loss", every=SELDOM, **options)
    return {seed: math.log(last[seed] / averaged[seed]) for seed in averaged}


def judge(results: Results) -> list[Finding]:
    grid, best = results["grid"], results["best"]
    rates, decays = grid.rates("AdamW"), grid.arm("AdamW").grid["weight_decay"]
    large, small = (rates[-1], decays[-1]), (rates[0], decays[0])
    terms: dict[str, Any] = {"every": SELDOM, "weight_decay": large[1]}
    averaged, last = (grid.values("AdamW", large[0], metric, **terms) for metric in ("test loss", "last test loss"))
    gained, less = (gain(grid, lr, weight_decay=decay) for lr, decay in (large, small))
    seldom, often = (mean_log(grid, every) for every in (SELDOM, OFTEN))
    ends = ("large and strong", "small and none")
    found = [
        lower(
            "AdamW, large rate and strong decay: the average has a lower test loss than the last iterate.",
            averaged,
            last,
            names=("average", "last"),
            ratio=True,
        ),
        higher(
            "Averaging gains more there than at a small rate without decay.", gained, less, "of log loss", names=ends
        ),
        alike(
            "An average over one iterate an epoch is as good as one over all.",
            seldom,
            often,
            MARGIN,
            "log loss",
            names=("one an epoch", "all"),
        ),
    ]
    for mine in ("Gadam", "GadamX"):
        for other in ("AdamW, cosine", "SGD, averaged"):
            values, others = (best.values(arm, metric="test loss") for arm in (mine, other))
            statement = f"Tuned, {mine} has a lower test loss than {other}."
            found.append(lower(statement, values, others, "nats", names=(mine, other), ratio=True))
    return found


def mean_log(grid: Measured, every: str) -> dict[int, float]:
    """The logarithm of the average's test loss, in the mean over rates and decays, by seed."""
    decays = grid.arm("AdamW").grid["weight_decay"]
    cells = [(lr, decay) for lr in grid.rates("AdamW") for decay in decays]
    columns = [grid.values("AdamW", lr, "test loss", every=every, weight_decay=decay) for lr, decay in cells]
    return {seed: statistics.fmean(math.log(column[seed]) for column in columns) for seed in columns[0]}


def draw(results: Results) -> Any:
    figure, (left, right) = new_figure(1, 2, 9, 3.6)
    grid, best = results["grid"], results["best"]
    rates = grid.rates("AdamW")
    for decay, colour in zip(grid.arm("AdamW").grid["weight_decay"], COLOURS, strict=False):
        for metric, style in (("test loss", "-"), ("last test loss", ":")):
            means = [grid.mean("AdamW", lr, metric, weight_decay=decay, every=SELDOM) for lr in rates]
            what = "average" if style == "-" else "last iterate"
            left.plot(rates, means, style, marker="o", markersize=3, color=colour, label=f"decay {decay:g}, {what}")
    left.set(xscale="log", xlabel="learning rate", ylabel="test loss, nats", title="AdamW, averaged")
    left.legend(fontsize=7)
    names = [arm.name for arm in best.part.arms]
    right.boxplot([list(best.values(name, metric="test loss").values()) for name in names], orientation="horizontal")
    right.set_yticks(range(1, len(names) + 1), names)
    right.set(xlabel="test loss, nats", title="Each at its best rate and decay")
    return figure


CLAIM = Claim(
    name="averaging",
    title="Averaging iterates beats the last one at a large learning rate with strong decay; Gadam and GadamX.",
    papers="Granziol et al. 2020, arXiv:2003.01247; Izmailov et al. 2018, arXiv:1803.05407",
    setting="a convolutional net on digits, batches of 32, 775 steps, of which the second half is averaged; 3 learning "
    "rates by 3 decays",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims averaging --size large`: width 64, 250 epochs",
)
