"""Where RMSprop element by element is better than with one rate for the whole vector, and where it is not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import Split, digits, source_text
from benchmarks.claims.finding import Finding, alike, lower
from benchmarks.claims.models import Transformer, memory, perceptron
from benchmarks.claims.plots import band
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, train, warm_up
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

ELEMENTS, ONE = "element by element", "one rate"
RAW, ROTATED, DIGITS, TEXT = "raw features", "rotated features", "digits", "text"
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
MARGIN = 0.02  # nats of test loss on digits, where 0.1 to 0.15 is usual
Data = tuple[Tensor, Tensor]


@functools.lru_cache
def cells() -> tuple[Split, Split, Split]:
    """569 breast tumours of scikit-learn, 30 features of mean 0: 300 for training, 100 for choosing, 169 for the test.

    All features are divided by one number, so their spreads still differ by a factor of 200 000.
    """
    from sklearn.datasets import load_breast_cancer

    features, targets = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(features)[order], torch.tensor(targets, dtype=torch.int64)[order]
    x = x - x[:300].mean(0)
    x = (x / x[:300].square().mean().sqrt()).to(torch.float32)
    return tuple(Split(x[a:b], y[a:b]) for a, b in ((0, 300), (300, 400), (400, 569)))  # type: ignore[return-value]


@dataclass(frozen=True)
class OnVectors:
    """Trains a perceptron on `data`: raw or rotated features, or digits. A seed has its own rotation."""

    data: str
    width: int
    steps: int
    batch: int = 50

    def model(self) -> nn.Module:
        return perceptron(self.width, inputs=64 if self.data == DIGITS else 30)

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images, choose, test = digits() if self.data == DIGITS else cells()
        if self.data == ROTATED:
            turn = nn.init.orthogonal_(torch.empty(30, 30))
            images, choose, test = (Split(split.x @ turn, split.y) for split in (images, choose, test))
        batches = images.batches(self.batch, seed)
        return trained(self.model(), candidate, lr, batches, self.steps, (choose.x, choose.y), (test.x, test.y))


@dataclass(frozen=True)
class OnText:
    """Trains a small transformer on source text."""

    width: int
    steps: int
    batch: int = 16
    length: int = 32

    def model(self) -> nn.Module:
        return Transformer(width=self.width, length=self.length)

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        text, choose, test = source_text()
        batches = text.batches(self.batch, self.length, seed)
        held, tested = choose.windows(64, self.length), test.windows(256, self.length)
        return trained(self.model(), candidate, lr, batches, self.steps, held, tested)


def trained(
    model: nn.Module, candidate: Candidate, lr: float, batches: Iterator[Data], steps: int, held: Data, tested: Data
) -> Outcome:
    """Train with warm-up and cosine, and return the losses on data for choosing and for the test."""
    model = model.to(DEVICE)
    losses = train(model, optimizer_of(model, candidate.spec, lr), batches, steps, lr_at=warm_up(0.1, cosine))
    found = {"loss": evaluate(model, *held)[0], "test loss": evaluate(model, *tested)[0]}
    return Outcome(metrics=outcome(losses, steps, **found).metrics)


def parts(size: Size) -> list[Part]:
    arms = [
        Arm(ELEMENTS, 3e-3, {"name": "rmsprop"}),
        Arm(ONE, 3e-3, {"name": "scalar_rmsprop", "normalize_by_dim": True, "debias": True}),
    ]
    text = OnText(width=size.wide(32, 8), steps=size.long(400))
    steps = size.long(400)
    runs: list[tuple[str, OnVectors | OnText, int]] = [
        (name, OnVectors(name, size.wide(32), steps), 8) for name in (RAW, ROTATED, DIGITS)
    ]
    runs.append((TEXT, text, 5))

    def part(name: str, run: OnVectors | OnText, seeds: int) -> Part:
        activations = 40 * 16 * 32 * run.width if isinstance(run, OnText) else 4 * run.batch * run.width
        build: Callable[[], nn.Module] = run.model
        return Part(
            name,
            run,
            arms,
            factors=size.some(FACTORS),
            seeds=size.seeds(seeds),
            tuning=size.seeds(2),
            extend=2 if size.whole else 0,
            bytes=memory(build, activations, slots=1),
        )

    return [part(*one) for one in runs]


def judge(results: Results) -> list[Finding]:
    def tested(part: str, arm: str) -> dict[int, float]:
        return results[part].values(arm, metric="test loss")

    both, unit = (ELEMENTS, ONE), "nats of test loss"
    raw = "On features of very different scales, element by element loses less than one rate."
    turned = "A rotation of these features takes away what it gains: element by element loses less on the raw ones."
    text = "In a transformer on text, element by element loses less than one rate."
    images = "In a perceptron on digits, whose scales are alike, both lose the same."
    rotation = tested(RAW, ELEMENTS), tested(ROTATED, ELEMENTS)
    return [
        lower(raw, tested(RAW, ELEMENTS), tested(RAW, ONE), unit, names=both),
        lower(turned, *rotation, unit, names=("raw", "rotated")),
        lower(text, tested(TEXT, ELEMENTS), tested(TEXT, ONE), unit, names=both),
        alike(images, tested(DIGITS, ELEMENTS), tested(DIGITS, ONE), MARGIN, unit, names=both),
    ]


def draw(results: Results) -> Any:
    figure, axes = new_figure(2, 2, 7.2, 5.4)
    for axis, name in zip(axes, (RAW, ROTATED, DIGITS, TEXT), strict=True):
        found = results[name]
        for arm, colour in ((ELEMENTS, "tab:blue"), (ONE, "tab:orange")):
            rates = found.rates(arm)
            tried = [[o.metrics["test loss"] for key, o in found.runs.items() if key[:2] == (arm, lr)] for lr in rates]
            band(axis, rates, tried, arm, marker="o", markersize=3, color=colour)
            chosen = found.best(arm).lr
            axis.plot([chosen], [found.mean(arm, chosen, "test loss")], marker="s", color=colour, linestyle="none")
        axis.set(title=name.capitalize(), ylabel="test loss, nats", xscale="log", xlabel="learning rate")
    axes[0].legend(fontsize=7)
    return figure


CLAIM = Claim(
    name="rmsprop",
    title="RMSprop element by element is better where scales differ along the axes; else one rate is as good.",
    papers="Tieleman & Hinton 2012; Su 2018; Wang & Wiens 2020, arXiv:2006.16541",
    setting=(
        "a perceptron of two hidden layers on 30 features of tumours, raw and rotated, and on digits; a transformer of "
        "two blocks on source text; 400 steps, warm-up and cosine; 5 learning rates and more at the edges, 8 seeds "
        "(text: 5)"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims rmsprop --size large`: width 8 times as large, 10 times the steps",
)
