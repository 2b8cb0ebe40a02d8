"""Whether Adan reaches the loss of AdamW in half the steps, and loses less where batches are large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import source_text
from benchmarks.claims.finding import Finding, Values, lower
from benchmarks.claims.models import Transformer, memory
from benchmarks.claims.plots import COLOURS, band, by_step
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, train, warm_up
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

FACTORS = (0.3, 1.0, 3.0)
DECAYS = (0.0, 0.1)
SEEDS = 8
BATCH, BATCHES = 16, (16, 64, 256)
MARGIN = 0.02  # nats; by less a loss is no higher
SIDES = ("adan", "adamw")
SHORT = "adan with β₁ 0.9"
RATES = {"adamw": 3e-3, "adan": 1.5e-2}  # at batches of 16; `lr_from_adamw` of Adan is 5


@dataclass(frozen=True)
class Text:
    """Trains a small transformer on windows of source text.

    Of a candidate's spec `share` is the share of `windows` that it sees, and `batch` how many of them in a step.
    """

    width: int
    windows: int
    length: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_text, choose, test = source_text()
        spec = dict(candidate.spec)
        share, batch = spec.pop("share"), spec.pop("batch")
        steps = max(2, round(self.windows * share / batch))
        model = Transformer(width=self.width, length=self.length).to(DEVICE)
        optimizer = optimizer_of(model, spec, lr)
        losses = train(
            model, optimizer, train_text.batches(batch, self.length, seed), steps, lr_at=warm_up(0.1, cosine)
        )
        held, _ = evaluate(model, *choose.windows(64, self.length))
        tested, _ = evaluate(model, *test.windows(256, self.length))
        return outcome(losses, steps, **{"loss": held, "test loss": tested})


def parts(size: Size) -> list[Part]:
    run = Text(width=size.wide(32, 8), windows=BATCH * size.long(600))
    decays = {"weight_decay": DECAYS if size.whole else DECAYS[:1]}

    def arm(name: str, batch: int, share: float = 1.0) -> Arm:
        label = f"{name}, half the steps" if share < 1 else f"{name}, batches of {batch}"
        lr = RATES[name] * (batch / BATCH) ** 0.5
        return Arm(label, lr, {"name": name, "batch": batch, "share": share}, decays)

    arms = [arm(name, BATCH, 0.5) for name in RATES] + [
        arm(name, batch) for name in RATES for batch in size.some(BATCHES)
    ]
    lr, spec, short = arms[1].lr, arms[1].spec, {"betas": [0.9, 0.92, 0.99]}
    arms.append(Arm(f"{SHORT}, half the steps", lr, {**spec, **short}, decays))
    activations = 40 * max(BATCHES) * run.length * run.width
    needed = memory(lambda: Transformer(width=run.width, length=run.length), activations, slots=4)
    factors, seeds = size.some(FACTORS), size.seeds(SEEDS)
    return [
        Part("text", run, arms, factors=factors, seeds=seeds, tuning=2 if size.whole else 1, extend=2, bytes=needed)
    ]


def judge(results: Results) -> list[Finding]:
    text = results["text"]

    def loss(name: str, way: str) -> dict[int, float]:
        return text.values(f"{name}, {way}", metric="test loss")

    half, small, large = "half the steps", f"batches of {BATCHES[0]}", f"batches of {BATCHES[-1]}"
    allowed = {seed: value + MARGIN for seed, value in loss("adamw", small).items()}
    lost = {name: _differences(loss(name, large), loss(name, small)) for name in RATES}
    found = []
    for name, said in (("adan", "Adan"), (SHORT, "Adan with β₁ = 0.9, tried afterwards,")):
        told = f"In half of AdamW's steps {said} reaches a test loss that is less than {MARGIN:g} nats above AdamW's."
        found.append(lower(told, loss(name, half), allowed, "nats", names=("adan", f"adamw and {MARGIN:g}")))
        told = f"In as many steps, the half, {said} reaches a lower test loss than AdamW."
        found.append(lower(told, loss(name, half), loss("adamw", half), "nats", names=SIDES))
    told = f"At batches of {BATCHES[-1]} and as many samples Adan reaches a lower test loss than AdamW."
    found.append(lower(told, loss("adan", large), loss("adamw", large), "nats", names=SIDES))
    told = f"From batches of {BATCHES[0]} to {BATCHES[-1]} Adan loses less than AdamW."
    return [*found, lower(told, lost["adan"], lost["adamw"], "nats", names=SIDES)]


def _differences(values: Values, others: Mapping[int, float]) -> dict[int, float]:
    return {seed: value - others[seed] for seed, value in values.items()}


def draw(results: Results) -> Any:
    text = results["text"]
    figure, (left, right) = new_figure(1, 2, 8, 3.3)
    shown = (f"adamw, batches of {BATCH}", *(f"{name}, half the steps" for name in (*reversed(SIDES), SHORT)))
    for arm in shown:
        by_step(left, text, arm, "training loss")
    lowest = min(min(ys) for _, ys in text.curves("adan, half the steps", "training loss"))
    left.set(ylabel="training loss, nats", ylim=(0.9 * lowest, 2 * lowest), title=f"Batches of {BATCH}")
    batches = sorted({arm.spec["batch"] for arm in text.part.arms})
    for name, colour in zip(RATES, COLOURS, strict=False):
        columns = [list(text.values(f"{name}, batches of {batch}", metric="test loss").values()) for batch in batches]
        band(right, batches, columns, name, marker="o", color=colour)
    right.set(xscale="log", xlabel="windows in a batch", ylabel="test loss, nats", title="As many windows in all")
    right.set_xticks(batches, [str(batch) for batch in batches])
    right.minorticks_off()
    left.legend(fontsize=8)
    right.legend()
    return figure


CLAIM = Claim(
    name="adan",
    title="Adan reaches Adam's loss in half the steps, and tolerates large batches.",
    papers="Xie et al. 2022, arXiv:2208.06677",
    setting="a transformer of two blocks of width 32 on 9600 windows of source text: 600 steps of 16 windows, 150 of "
    "64 or 38 of 256; warm-up and cosine; 3 learning rates, more where the best is at the edge, by 2 decays, chosen "
    "on 2 other seeds and other text; 8 seeds.",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims adan --size large`: width 256, 6000 steps.",
)
