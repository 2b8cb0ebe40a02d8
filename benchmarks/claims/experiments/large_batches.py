"""Whether LARS and LAMB keep accuracy at large batches, where SGD and AdamW lose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits, source_text
from benchmarks.claims.finding import Finding, higher, lower
from benchmarks.claims.models import Transformer, convolutional, memory
from benchmarks.claims.plots import COLOURS, band, by_step
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, spec_without, train, warm_up
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = 8
IMAGES, WINDOWS = (25, 125, 500), 256  # in a batch
SPECS: dict[str, tuple[float, dict[str, Any]]] = {  # the learning rate at batches of 25, and the spec; no decay
    "sgd": (0.05, {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0}),
    "lars": (3.0, {"name": "lars", "momentum": 0.9, "weight_decay": 0.0}),
    "adamw": (3e-3, {"name": "adamw", "weight_decay": 0.0}),
    "lamb": (1.5e-2, {"name": "lamb", "weight_decay": 0.0}),
}


@dataclass(frozen=True)
class Digits:
    """Trains a convolutional net on `images` digits, counted with repetition, in batches of the candidate's size."""

    width: int
    images: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_set, choose, test = digits()
        batch = candidate.spec["batch"]
        steps = max(2, self.images // batch)
        model = convolutional(self.width).to(DEVICE)
        optimizer = optimizer_of(model, spec_without(candidate, "batch"), lr)
        losses = train(model, optimizer, train_set.batches(batch, seed), steps, lr_at=warm_up(0.1, cosine))
        held, _ = evaluate(model, choose.x, choose.y)
        tested, right = evaluate(model, test.x, test.y)
        return outcome(losses, steps, **{"loss": held, "test loss": tested, "accuracy": 100 * right})


@dataclass(frozen=True)
class Text:
    """Trains a small transformer on source text in batches of the candidate's size."""

    width: int
    steps: int
    length: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_text, choose, test = source_text()
        model = Transformer(width=self.width, length=self.length).to(DEVICE)
        optimizer = optimizer_of(model, spec_without(candidate, "batch"), lr)
        batches = train_text.batches(candidate.spec["batch"], self.length, seed)
        losses = train(model, optimizer, batches, self.steps, lr_at=warm_up(0.1, cosine))
        held, _ = evaluate(model, *choose.windows(64, self.length))
        tested, _ = evaluate(model, *test.windows(256, self.length))
        return outcome(losses, self.steps, **{"loss": held, "test loss": tested})


def arm(name: str, batch: int) -> Arm:
    lr, spec = SPECS[name]
    return Arm(f"{name}, {batch}", lr * (batch / IMAGES[0]) ** 0.5, {**spec, "batch": batch})


def parts(size: Size) -> list[Part]:
    images = Digits(width=size.wide(16), images=IMAGES[0] * size.long(640))
    text = Text(width=size.wide(32, 8), steps=size.long(38))
    arms = [arm(name, batch) for name in SPECS for batch in size.some(IMAGES)]
    grid: dict[str, Any] = {"factors": size.some(FACTORS), "seeds": size.seeds(SEEDS), "extend": 2}
    grid["tuning"] = 2 if size.whole else 1
    needed = memory(lambda: convolutional(images.width), max(IMAGES) * 200 * images.width)
    model = memory(lambda: Transformer(width=text.width, length=text.length), 40 * WINDOWS * text.length * text.width)
    return [
        Part("digits", images, arms, bytes=needed, **grid),
        Part("text", text, [arm(name, WINDOWS) for name in ("adamw", "lamb")], bytes=model, **grid),
    ]


def judge(results: Results) -> list[Finding]:
    small, large = IMAGES[0], IMAGES[-1]
    found = []
    for name, plain in (("lars", "sgd"), ("lamb", "adamw")):
        right = {one: results["digits"].values(f"{one}, {large}", metric="accuracy") for one in (name, plain)}
        before = {one: results["digits"].values(f"{one}, {small}", metric="accuracy") for one in (name, plain)}
        lost = {one: {seed: before[one][seed] - right[one][seed] for seed in right[one]} for one in right}
        sides = (name, plain)
        told = f"At batches of {large} digits {name.upper()} is right more often than {_said(plain)}."
        found.append(higher(told, right[name], right[plain], "%", names=sides))
        told = f"From batches of {small} to {large} digits {name.upper()} loses less accuracy than {_said(plain)}."
        found.append(lower(told, lost[name], lost[plain], "points", names=sides))
    loss = {one: results["text"].values(f"{one}, {WINDOWS}", metric="test loss") for one in ("lamb", "adamw")}
    told = f"At batches of {WINDOWS} windows of text LAMB reaches a lower test loss than AdamW."
    return [*found, lower(told, loss["lamb"], loss["adamw"], "nats", names=("lamb", "adamw"))]


def _said(name: str) -> str:
    return {"sgd": "SGD", "adamw": "AdamW"}[name]


def draw(results: Results) -> Any:
    shown = results["digits"]
    batches = sorted({one.spec["batch"] for one in shown.part.arms})
    figure, (left, right) = new_figure(1, 2, 8, 3.3)
    for name, colour in zip(SPECS, COLOURS, strict=False):
        columns = [list(shown.values(f"{name}, {batch}", metric="accuracy").values()) for batch in batches]
        band(left, batches, columns, name, marker="o", color=colour)
    left.set(xscale="log", xlabel="images in a batch", ylabel="right on the test images, %", title="Digits")
    left.set_xticks(batches, [str(batch) for batch in batches])
    for name, colour in zip(("adamw", "lamb"), COLOURS[2:], strict=False):
        by_step(right, results["text"], f"{name}, {WINDOWS}", "training loss", label=name, color=colour)
    right.set(ylabel="training loss, nats", title=f"Source text, batches of {WINDOWS}")
    left.minorticks_off()
    left.legend()
    right.legend()
    return figure


CLAIM = Claim(
    name="large_batches",
    title="LARS and LAMB keep accuracy at large batches where SGD and Adam lose it.",
    papers="You et al. 2017, arXiv:1708.03888; You et al. 2019, arXiv:1904.00962",
    setting="a convolutional net of width 16 on 16 epochs of 1000 digits: 640 steps of 25, 128 of 125 or 32 of 500; a "
    "transformer of width 32 on source text, 38 steps of 256 windows; warm-up and cosine, no decay; 5 learning rates "
    "around a centre that grows with the root of the batch, more where the best is at the edge, chosen on 2 other "
    "seeds and other data; 8 seeds.",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims large_batches --size large`: width 128 and 256, 160 epochs.",
)
