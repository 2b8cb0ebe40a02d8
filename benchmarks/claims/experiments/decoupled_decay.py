"""Whether decoupled weight decay makes the best decay independent of the learning rate, as an L2 penalty does not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import Split, digits
from benchmarks.claims.finding import Finding, lower
from benchmarks.claims.models import CLASSES, memory, perceptron
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, train
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

L2, TIMES_LR, PAPER = "L2", "decay times lr", "decay as in the paper"
PLAIN, NORMALIZED = "plain", "batch norm"
RATES = (0.2, 0.5, 1.0, 2.0, 4.0)
DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SEEDS = 5
WORST = 1.2  # nats; higher losses have the same colour


@dataclass(frozen=True)
class FewDigits:
    """Trains a perceptron on few digits, some with a wrong label, so that it overfits and decay matters.

    `by_lr` of a candidate's spec says whether `weight_decay` is multiplied by the learning rate, as in torch; else a
    step takes `weight_decay` times the factor of the schedule, as in the paper.
    """

    width: int
    steps: int
    norm: bool
    images: int = 300
    wrong: float = 0.2
    batch: int = 50

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images, choose, test = digits()
        y = images.y[: self.images].clone()
        wrong = torch.rand(len(y)) < self.wrong
        y[wrong] = torch.randint(CLASSES, (len(y),))[wrong]
        decay = candidate.spec["weight_decay"] / (1.0 if candidate.spec["by_lr"] else lr)
        model = perceptron(self.width, norm=self.norm).to(DEVICE)
        optimizer = optimizer_of(model, {"name": candidate.spec["name"], "weight_decay": decay}, lr)
        batches = Split(images.x[: self.images], y).batches(self.batch, seed)
        train(model, optimizer, batches, self.steps, lr_at=cosine)
        held, tested = (evaluate(model, split.x, split.y)[0] for split in (choose, test))
        return Outcome(metrics={"loss": round(held, 4), "test loss": round(tested, 4)})


def parts(size: Size) -> list[Part]:
    terms: dict[str, Any] = {"factors": size.some(RATES), "seeds": size.seeds(SEEDS)}
    found = []
    for name, norm, middle in ((PLAIN, False, 1.0), (NORMALIZED, True, 3.0)):
        run = FewDigits(width=size.wide(64), steps=size.long(400), norm=norm)
        arms = [
            _arm(L2, "adam", True, middle / 100, size),
            _arm(TIMES_LR, "adamw", True, middle, size),
            _arm(PAPER, "adamw", False, middle / 100, size),  # the same at the rate in the middle
        ]
        needed = memory(lambda: perceptron(run.width), activations=8 * run.batch * run.width)  # noqa: B023
        found.append(Part(name, run, arms, bytes=needed, **terms))
    return found


def _arm(name: str, optimizer: str, by_lr: bool, middle: float, size: Size) -> Arm:
    decays = tuple(float(f"{middle * factor:.6g}") for factor in size.some(DECAYS))
    return Arm(name, 1e-2, {"name": optimizer, "by_lr": by_lr}, {"weight_decay": decays})


def decays(found: Measured, arm: str) -> Sequence[float]:
    """The decays of an arm, from the lowest."""
    grid: Sequence[float] = found.arm(arm).grid["weight_decay"]
    return grid


def best_logarithm(grid: Sequence[float], losses: Sequence[float]) -> float:
    """The logarithm to base 10 of the best decay: the lowest point of a parabola through the best and its neighbours.

    Args:
        grid: The decays.
        losses: Of each.
    """
    logs = [math.log10(decay) for decay in grid]
    i = min(range(len(grid)), key=losses.__getitem__)
    if i in (0, len(grid) - 1):
        return logs[i]
    (a, b, c), (x, y, z) = logs[i - 1 : i + 2], losses[i - 1 : i + 2]
    bend = (b - a) * (y - z) - (b - c) * (y - x)
    return b - ((b - a) ** 2 * (y - z) - (b - c) ** 2 * (y - x)) / (2 * bend) if bend else b


def best_decays(found: Measured, arm: str, seed: int) -> list[float]:
    """For each learning rate the logarithm of the decay with the lowest validation loss of a seed."""
    grid = decays(found, arm)
    return [
        best_logarithm(grid, [found.values(arm, lr, weight_decay=decay)[seed] for decay in grid])
        for lr in found.rates(arm)
    ]


def dependence(found: Measured, arm: str) -> dict[int, float]:
    """By seed the slope of the logarithm of the best decay over that of the learning rate, without its sign."""
    logs = [math.log10(lr) for lr in found.rates(arm)]
    seeds = found.values(arm, found.rates(arm)[0], weight_decay=decays(found, arm)[0])
    return {seed: abs(statistics.linear_regression(logs, best_decays(found, arm, seed)).slope) for seed in seeds}


def judge(results: Results) -> list[Finding]:
    findings = []
    for name, of in ((PLAIN, "without normalization"), (NORMALIZED, "with batch normalization")):
        found = results[name]
        slopes = {arm: dependence(found, arm) for arm in (L2, TIMES_LR, PAPER)}
        tested = {arm: found.values(arm, metric="test loss") for arm in (L2, TIMES_LR)}
        paper = (
            f"In a net {of}, the best decay depends less on the learning rate as in the paper than as an L2 penalty."
        )
        torch_way = f"In a net {of}, so it does multiplied by lr, as in torch."
        better = f"In a net {of}, each at its best rate and decay, AdamW has a lower test loss than Adam with L2."
        unit = "decades per decade"
        findings += [
            lower(paper, slopes[PAPER], slopes[L2], unit, names=("paper", "L2")),
            lower(torch_way, slopes[TIMES_LR], slopes[L2], unit, names=("times lr", "L2")),
            lower(better, tested[TIMES_LR], tested[L2], "nats", names=("adamw", "adam")),
        ]
    return findings


def draw(results: Results) -> Any:
    figure, axes = new_figure(2, 3, 7.2, 5)
    for row, name in enumerate((PLAIN, NORMALIZED)):
        found = results[name]
        for axis, arm in zip(axes[3 * row :], (L2, TIMES_LR, PAPER), strict=False):
            rates, rows = found.rates(arm), decays(found, arm)
            values = [
                [min(WORST, found.mean(arm, lr, "test loss", weight_decay=decay)) for lr in rates] for decay in rows
            ]
            axis.imshow(values, aspect="auto", cmap="viridis_r", origin="lower")
            best = [statistics.fmean(column) for column in zip(*_best_of_seeds(found, arm), strict=True)]
            low, step = math.log10(rows[0]), math.log10(rows[-1] / rows[0]) / (len(rows) - 1)
            axis.plot([(log - low) / step for log in best], color="tab:red", marker="o", markersize=4)  # over columns
            axis.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates], fontsize=7)
            axis.set_yticks(range(len(rows)), [f"{decay:g}" for decay in rows], fontsize=7)
            axis.set_title(f"{arm}, {name}", fontsize=8)
            axis.set(xlabel="learning rate" if row else "")
        axes[3 * row].set(ylabel="weight decay")
        figure.colorbar(axes[3 * row].images[0], ax=axes[3 * row : 3 * row + 3], label="test loss, nats")
    figure.suptitle("Red: the best decay at each learning rate, by validation loss", fontsize=9)
    return figure


def _best_of_seeds(found: Measured, arm: str) -> list[list[float]]:
    return [best_decays(found, arm, seed) for seed in dependence(found, arm)]


CLAIM = Claim(
    name="decoupled_decay",
    title="Decoupled decay makes the best decay independent of the learning rate; an L2 penalty in Adam does not.",
    papers="Loshchilov & Hutter 2019, arXiv:1711.05101",
    setting=(
        "perceptrons of two hidden layers on 300 digits of which a fifth has a label of chance, 400 steps, cosine; "
        "5 learning rates from 0.002 to 0.04 by 7 decays over three decades, 5 seeds"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims decoupled_decay --size large`: width 512, 4000 steps",
)
