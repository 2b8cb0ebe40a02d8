"""Whether ACProp converges on the counter-examples on which Adam fails, and is the better one on real data."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits, source_text
from benchmarks.claims.finding import Finding, lower
from benchmarks.claims.models import Transformer, convolutional, memory
from benchmarks.claims.plots import heat_map
from benchmarks.claims.results import TUNING, Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, train
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

KINDS = ("periodic", "random", "sparse")
PERIODS = (4, 10, 30, 101)
BETAS = (0.5, 0.9, 0.99, 0.999)
FACTORS = (0.3, 1.0, 3.0, 10.0)
SEEDS = 5


@dataclass(frozen=True)
class Line:
    """Minimizes linear losses between -1 and 1, whose mean is least at -1, with learning rate lr / √t.

    All lines are elements of one parameter, three kinds for each period P. Reddi et al.: the slope is P in one step of
    P, else -1, with a fixed period or at random. "sparse" is the one of Zhuang et al. on which a second moment that is
    not centred fails though it is asynchronous: P / 2 in one step of P, -1 in the one before the last, else 0.
    A candidate's `beta2` goes where its optimizer keeps it. The seed decides start, phases and random steps.
    """

    steps: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        generator = torch.Generator().manual_seed(seed)
        periods = torch.tensor([float(period) for period in PERIODS])
        start = 2 * torch.rand(len(KINDS) * len(PERIODS), generator=generator) - 1
        phases = (torch.rand(len(PERIODS), generator=generator) * periods).floor()
        chance = torch.rand(self.steps, len(PERIODS), generator=generator)
        each_alone = candidate.spec.get("scope") == "tensor"
        lines: list[Any] = [nn.Parameter(x.clone()) for x in (start.split(1) if each_alone else [start])]
        optimizer = optimizer_of(nn.ParameterList(lines), _with_beta2(candidate.spec), lr)
        last: list[Tensor] = []
        for step in range(self.steps):
            slopes = _slopes(step + phases, periods, chance[step])
            for line, slope in zip(lines, slopes.split(1) if each_alone else [slopes], strict=True):
                line.grad = slope
            optimizer.param_groups[0]["lr"] = lr / (step + 1) ** 0.5
            optimizer.step()
            with torch.no_grad():
                torch._foreach_clamp_min_(lines, -1)
                torch._foreach_clamp_max_(lines, 1)
                if step >= self.steps * 3 // 4:
                    last.append(torch.cat(lines))
        away = ((torch.stack(last).mean(0) + 1) / 2).view(len(KINDS), -1)
        by_kind = dict(zip(KINDS, away.tolist(), strict=True))
        metrics = {kind: statistics.fmean(values) for kind, values in by_kind.items()}
        curves = {kind: (list(map(float, PERIODS)), values) for kind, values in by_kind.items()}
        return Outcome(metrics=metrics, curves=curves)


def _slopes(at: Tensor, periods: Tensor, chance: Tensor) -> Tensor:
    """The gradients of a step: of each kind one for each period."""
    at = at % periods
    periodic = torch.where(at == 0, periods, -1.0)
    random = torch.where(chance < 1 / periods, periods, -1.0)
    sparse = torch.where(at == 0, periods / 2, torch.where(at == periods - 2, -1.0, 0.0))
    return torch.cat([periodic, random, sparse])


def _with_beta2(spec: Any) -> dict[str, Any]:
    options = {key: value for key, value in spec.items() if key != "beta2"}
    alone = options["name"] == "moment_estimation_sgd"
    return {**options, **({"beta": spec["beta2"]} if alone else {"betas": (0.9, spec["beta2"])}), "weight_decay": 0.0}


@dataclass(frozen=True)
class Net:
    """Trains a convolutional net on digits, or a transformer on source text, with a cosine schedule."""

    data: str
    width: int
    steps: int
    batch: int = 16
    length: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        text = self.data == "text"
        model = (Transformer(width=self.width, length=self.length) if text else convolutional(self.width)).to(DEVICE)
        optimizer = optimizer_of(model, {**candidate.spec, "weight_decay": 0.0}, lr)
        if text:
            some, choose, test = source_text()
            batches = some.batches(self.batch, self.length, seed)
            held, tested = choose.windows(64, self.length), test.windows(256, self.length)
        else:
            images, choose_images, test_images = digits()
            batches = images.batches(self.batch, seed)
            held, tested = (choose_images.x, choose_images.y), (test_images.x, test_images.y)
        losses = train(model, optimizer, batches, self.steps, lr_at=cosine)
        (held_loss, _), (test_loss, right) = evaluate(model, *held), evaluate(model, *tested)
        found = outcome(losses, self.steps, **{"loss": held_loss, "test loss": test_loss, "test accuracy": right})
        return Outcome(metrics=found.metrics)


def parts(size: Size) -> list[Part]:
    centred = {"name": "adabelief", "eps": 1e-8, "rectify": False}
    grid = {"beta2": size.some(BETAS)}
    lines = [
        Arm("adam", 1.0, {"name": "adam"}, grid),
        Arm("adabelief", 1.0, centred, grid),
        Arm("asynchronous", 1.0, {"name": "moment_estimation_sgd", "scope": "tensor"}, grid),
        Arm("acprop", 1.0, {"name": "acprop"}, grid),
    ]
    nets = [
        Arm("adam", 3e-3, {"name": "adam"}),
        Arm("adabelief", 3e-3, centred),
        Arm("acprop", 3e-3, {"name": "acprop"}),
        Arm("acprop with momentum", 3e-3, {"name": "acprop", "momentum_update": True}),
    ]
    factors, seeds, extend = size.some(FACTORS), size.seeds(SEEDS), int(size.whole)
    images, text = (
        Net("digits", width=size.wide(16), steps=size.long(400)),
        Net("text", width=size.wide(32, 8), steps=size.long(400)),
    )
    needed = memory(lambda: Transformer(width=text.width), activations=40 * 16 * 32 * text.width)
    needed_images = memory(lambda: convolutional(images.width), activations=64 * 8 * images.batch * images.width)
    return [
        Part("lines", Line(size.long(6000)), lines, metric="periodic", seeds=seeds),
        Part(
            "digits",
            images,
            nets,
            factors=factors,
            seeds=size.seeds(8),
            tuning=1 + size.whole,
            extend=extend,
            bytes=needed_images,
        ),
        Part("text", text, nets, factors=factors, seeds=seeds, tuning=1, extend=extend, bytes=needed),
    ]


def _away(lines: Measured, arm: str, kind: str) -> dict[int, float]:
    """By seed the mean distance from the best point, over all β2."""
    found = [lines.values(arm, 1.0, kind, beta2=beta2) for beta2 in lines.arm(arm).grid["beta2"]]
    return {seed: statistics.fmean(values[seed] for values in found) for seed in found[0]}


def judge(results: Results) -> list[Finding]:
    lines = results["lines"]

    def nearer(statement: str, kind: str, other: str) -> Finding:
        sides = _away(lines, "acprop", kind), _away(lines, other, kind)
        return lower(statement, *sides, "of the way", names=("acprop", other))

    found = [
        nearer("On the counter-example of Reddi et al. ACProp ends nearer to the best than Adam.", "periodic", "adam"),
        nearer("So it does where the large gradient comes at random.", "random", "adam"),
        nearer("It is the asynchrony: AdaBelief, centred but synchronous, ends farther.", "periodic", "adabelief"),
        nearer("With sparse gradients it ends nearer than without centring.", "sparse", "asynchronous"),
    ]
    for data, what in (("digits", "On digits"), ("text", "On source text")):
        for arm, other in (("acprop", "adabelief"), ("acprop", "adam"), ("acprop with momentum", "adabelief")):
            one, two = (results[data].values(name, metric="test loss") for name in (arm, other))
            words = {"adabelief": "AdaBelief", "adam": "Adam"}[other]
            statement = f"{what} {arm.replace('acprop', 'ACProp')} loses less than {words}, each at its best rate."
            found.append(lower(statement, one, two, "nats", names=(arm, other)))
    return found


def draw(results: Results) -> Any:
    figure, axes = new_figure(2, 4, 10, 5)
    lines = results["lines"]
    for at, arm in zip(axes, ("adam", "adabelief", "asynchronous", "acprop"), strict=False):
        betas: Sequence[float] = lines.arm(arm).grid["beta2"]
        rows = [
            [statistics.fmean(column) for column in zip(*(ys for _, ys in found), strict=True)]
            for found in (lines.curves(arm, "periodic", 1.0, beta2=beta2) for beta2 in betas)
        ]
        heat_map(at, betas, PERIODS, [[round(value, 2) for value in row] for row in rows], arm)
        at.images[0].set_clim(0, 1)
        for text, value in zip(at.texts, itertools.chain(*rows), strict=True):
            text.set_color("white" if value > 0.4 else "black")
        at.set(xlabel="period P", ylabel="β2")
    figure.suptitle(
        "Large gradients with a fixed period: where it ends, from the best point (0) to the worst (1)", fontsize=10
    )
    grid = axes[4].get_gridspec()
    for at in axes[4:]:
        at.remove()
    for columns, data in ((slice(0, 2), "digits"), (slice(2, 4), "text")):
        at = figure.add_subplot(grid[1, columns])
        for arm in results[data].part.arms:
            _tuning(at, results[data], arm.name)
        at.set(ylabel="validation loss, nats", title=data, xscale="log", xlabel="learning rate")
    at.legend(fontsize=7)
    return figure


def _tuning(axes: Any, found: Measured, arm: str) -> None:
    """The loss on which an arm has chosen its learning rate, against that rate."""
    losses: dict[float, list[float]] = {}
    for (name, lr, seed), run in sorted(found.runs.items()):
        if name == arm and seed >= TUNING:
            losses.setdefault(lr, []).append(run.metrics["loss"])
    axes.plot(list(losses), [statistics.fmean(some) for some in losses.values()], marker="o", markersize=3, label=arm)


CLAIM = Claim(
    name="acprop",
    title="ACProp converges where Adam fails, and asynchronous beats synchronous second moments.",
    papers="Zhuang et al. 2021, arXiv:2110.05454",
    setting="lines with slopes of period 4 to 101, 6000 steps, 4 values of β2, 5 seeds; a convolutional net on digits "
    "(8 seeds) and a transformer of two blocks on source text (5), 400 steps, cosine schedule, 4 learning rates",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims acprop --size large`: width 8 times as large, 10 times the steps",
)
