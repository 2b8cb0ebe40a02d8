"""Whether R_med is smaller along Adam's trajectory than along that of SGD with momentum."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import Split, digits, source_text
from benchmarks.claims.finding import Finding, lower
from benchmarks.claims.models import Transformer, memory, perceptron
from benchmarks.claims.plots import log_ticks
from benchmarks.claims.results import TUNING, Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, Batches, optimizer_of, token_loss, train
from benchmarks.pictures import new_figure
from lightning_optim.analysis import hessian_diagonal, r_med
from lightning_optim.analysis.diagonal import Diagonal
from lightning_optim.analysis.products import Way
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Curve, Outcome
from lightning_optim.reports.local_geometry import ratio_at_equal_loss

FACTORS = (0.3, 1.0, 3.0)
SEEDS = 6
LOOKS = (0.0, 0.02, 0.04, 0.08, 0.15, 0.3, 0.55, 1.0)  # shares of the run
COMPONENTS = 32  # principal components of the digits
Loss = Callable[[Tensor, Tensor], Tensor]
NAMES = ("look loss", "r_med", "r_med by layer")
TITLES = {"text": "Transformer on text", "digits": "Perceptron on digits", "linear": "Two linear layers"}


@dataclass(frozen=True)
class Trajectory:
    """Trains without a schedule and looks at the Hessian's diagonal on a fixed batch; runs for choosing do not look.

    Attributes:
        problem: "text", a transformer on source text; "digits", a perceptron; or "linear", the two linear layers of the
            paper's theory, which find the number that a digit shows by least squares, from its whitened components.
        width: Of the model.
        steps: Of training.
        probes: For the diagonal.
        looks: Shares of the run at which it looks.
        length: Tokens of a window of text.
    """

    problem: str
    width: int
    steps: int
    probes: int
    looks: tuple[float, ...] = LOOKS
    length: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        model = self.model().to(DEVICE)
        batches, loss, x, y = self.data(seed)
        x, y = x.to(DEVICE), y.to(DEVICE)
        optimizer = optimizer_of(model, candidate.spec, lr)
        looks = sorted({round(share * self.steps) for share in self.looks}) if seed < TUNING else []
        found: list[tuple[int, float, float, float]] = []

        def look(step: int) -> None:
            if step in looks:
                way: Way = "differences" if self.problem == "text" else "autograd"  # attention has one derivative
                closure = functools.partial(of_batch, model, loss, x, y)
                diagonal = hessian_diagonal(closure, model.parameters(), self.probes, products=way)
                value = float(r_med(diagonal, nonzero_only=True))
                found.append((step, closure().item(), value, by_layer(diagonal)))

        look(0)
        losses = train(model, optimizer, batches, self.steps, after=lambda step: look(step + 1), loss=loss)
        last = losses[-max(1, self.steps // 20) :]
        done = len(losses) == self.steps and math.isfinite(losses[-1])
        metrics = {"loss": sum(last) / len(last) if done else losses[0], "finished": float(done)}
        curves: dict[str, Curve] = {}
        for i, name in enumerate(NAMES if found else ()):
            curves[name] = [float(one[0]) for one in found], [one[i + 1] for one in found]
        return Outcome(metrics=metrics, curves=curves)

    def model(self) -> nn.Module:
        if self.problem == "text":
            return Transformer(width=self.width, length=self.length)
        return perceptron(self.width) if self.problem == "digits" else two_layers(self.width)

    def data(self, seed: int) -> tuple[Batches, Loss, Tensor, Tensor]:
        """Batches, the loss, and the inputs and targets that are looked at."""
        if self.problem == "text":
            text = source_text()[0]
            return text.batches(16, self.length, seed), token_loss, *text.windows(16, self.length)
        images = digits()[0]
        if self.problem == "digits":
            return images.batches(50, seed), token_loss, images.x, images.y
        x, y = whitened(images)
        whole = Split(x, y)
        return whole.batches(len(whole), seed), mse_loss, x, y


def of_batch(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    found: Tensor = loss(model(x), y)
    return found


def by_layer(diagonal: Diagonal) -> float:
    """The geometric mean of R_med of each weight matrix by itself, as the paper's theory has it."""
    matrices = [i for i, param in enumerate(diagonal.params) if param.dim() > 1]
    return geometric_mean([float(r_med(diagonal.of(i), nonzero_only=True)) for i in matrices])


def two_layers(width: int) -> nn.Module:
    """Two linear layers without biases, which start near zero."""
    model = nn.Sequential(nn.Linear(COMPONENTS, width, bias=False), nn.Linear(width, 1, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.01)
    return model


def whitened(images: Split) -> tuple[Tensor, Tensor]:
    """The first principal components of images, and the numbers that they show, all of mean 0 and spread 1."""
    x = images.x.flatten(1).double()
    x, _, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = images.y.double()
    x, y = x[:, :COMPONENTS] * len(x) ** 0.5, ((y - y.mean()) / y.std()).unsqueeze(1)
    return x.float(), y.float()


def parts(size: Size) -> list[Part]:
    probes = size.long(100, least=4)
    looks = size.some(LOOKS)
    runs = {
        "text": (Trajectory("text", size.wide(32, 8), size.long(600), probes, looks), 0.1, 3e-3),
        "digits": (Trajectory("digits", size.wide(32), size.long(600), probes, looks), 0.03, 3e-3),
        "linear": (Trajectory("linear", size.wide(64), size.long(100), probes, looks), 0.03, 3e-3),
    }

    def needed(run: Trajectory) -> float:
        return memory(run.model, 400 * 1024 * run.width, slots=8)

    return [
        Part(
            name,
            run,
            [Arm("sgd", sgd, {"name": "sgd", "momentum": 0.9}), Arm("adam", adam, {"name": "adam"})],
            factors=size.some(FACTORS),
            seeds=size.seeds(SEEDS),
            tuning=1,
            extend=2,
            bytes=needed(run),
        )
        for name, (run, sgd, adam) in runs.items()
    ]


def histories(found: Measured, arm: str, which: str) -> dict[int, list[dict[str, float]]]:
    """What each seed has seen, as the callback `LocalGeometry` keeps it; `which` of both R_med."""
    told = {}
    for seed, outcome in found.outcomes(arm).items():
        losses, values = outcome.curves[NAMES[0]][1], outcome.curves[which][1]
        told[seed] = [{"loss": loss, "r_med": value} for loss, value in zip(losses, values, strict=True)]
    return told


def at_equal_loss(found: Measured, which: str) -> tuple[dict[int, float], dict[int, float]]:
    """R_med of Adam and of SGD by seed, geometric means over the losses of SGD's looks that Adam had too.

    The first look, before training, is the same for both and left out. Where no loss was common they are the last ones.
    """
    adam, sgd = histories(found, "adam", which), histories(found, "sgd", which)
    means: tuple[dict[int, float], dict[int, float]] = {}, {}
    for seed in adam.keys() & sgd.keys():
        there = {look["loss"]: look["r_med"] for look in sgd[seed][1:]}
        pairs = [(there[loss] / ratio, there[loss]) for loss, ratio in ratio_at_equal_loss(sgd[seed][1:], adam[seed])]
        pairs = pairs or [(adam[seed][-1]["r_med"], sgd[seed][-1]["r_med"])]
        for mean, column in zip(means, zip(*pairs, strict=True), strict=True):
            mean[seed] = geometric_mean(column)
    return means


def judge(results: Results) -> list[Finding]:
    findings = []
    for name, found in results.items():
        for which, told in ((NAMES[1], "all elements"), (NAMES[2], "each weight matrix")):
            statement = f"{TITLES[name]}: at equal loss R_med over {told} is smaller for Adam than for SGD."
            findings.append(lower(statement, *at_equal_loss(found, which), names=("adam", "sgd"), ratio=True))
    return findings


def draw(results: Results) -> Any:
    figure, panels = new_figure(2, len(results), 9, 5.4)
    for i, (axes, (which, (name, found))) in enumerate(
        zip(panels, itertools.product(NAMES[1:], results.items()), strict=True)
    ):
        for arm, colour in (("sgd", "tab:blue"), ("adam", "tab:orange")):
            for seed, looks in histories(found, arm, which).items():
                losses, values = [look["loss"] for look in looks], [look["r_med"] for look in looks]
                label = {"sgd": "SGD with momentum", "adam": "Adam"}[arm] if not seed else None
                axes.plot(losses, values, linewidth=1, color=colour, label=label)
        axes.set(xscale="log", yscale="log", title=f"{TITLES[name]}{', by matrix' if which == NAMES[2] else ''}")
        axes.invert_xaxis()
        low, high = sorted(axes.get_xlim())
        log_ticks(axes, (low * (high / low) ** share for share in (0.15, 0.5, 0.85)), digits=2)
        if i >= len(results):
            axes.set(xlabel="training loss")
    for axes in panels[:: len(results)]:
        axes.set(ylabel="R_med")
    panels[0].legend(fontsize=7)
    return figure


CLAIM = Claim(
    name="local_geometry",
    title="R_med is smaller along Adam's trajectory than along SGD's.",
    papers="Jiang, Malik & Li 2023, arXiv:2211.02254",
    setting="a transformer of width 32 on source text, a perceptron of width 32 on digits, 600 steps each, and two "
    "linear layers of width 64 on all digits, 100 steps; 8 looks with 100 probes; SGD with momentum and Adam at the "
    "constant learning rate with the least training loss at the end, of 3, more where the best is at the edge; 6 "
    "seeds.",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims local_geometry --size large`: width 256, 6000 steps, 1000 probes.",
)
