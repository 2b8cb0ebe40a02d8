"""Whether Adan reaches the loss of Adam in half the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import source_text
from benchmarks.claims.finding import Finding, lower
from benchmarks.claims.models import Transformer, memory
from benchmarks.claims.plots import by_step
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, train, warm_up
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

FACTORS = (0.3, 1.0, 3.0)
SEEDS = 5


@dataclass(frozen=True)
class Text:
    """Trains a small transformer on source text; `steps` of a candidate's spec are a share of `steps`."""

    width: int
    steps: int
    batch: int = 16
    length: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_text, choose, test = source_text()
        spec = {key: value for key, value in candidate.spec.items() if key != "share"}
        steps = max(2, round(self.steps * candidate.spec["share"]))
        model = Transformer(width=self.width, length=self.length).to(DEVICE)
        optimizer = optimizer_of(model, spec, lr)
        batches = train_text.batches(self.batch, self.length, seed)
        losses = train(model, optimizer, batches, steps, lr_at=warm_up(0.1, cosine))
        held, _ = evaluate(model, *choose.windows(64, self.length))
        tested, _ = evaluate(model, *test.windows(256, self.length))
        return outcome(losses, steps, **{"loss": held, "test loss": tested})


def parts(size: Size) -> list[Part]:
    run = Text(width=size.wide(32, 8), steps=size.long(600))
    arms = [
        Arm("adamw", 3e-3, {"name": "adamw", "share": 1.0}, {"weight_decay": (0.0, 0.1)}),
        Arm("adan, half the steps", 6e-3, {"name": "adan", "share": 0.5}, {"weight_decay": (0.0, 0.1)}),
    ]
    needed = memory(lambda: Transformer(width=run.width), activations=40 * run.batch * run.length * run.width)
    factors, seeds = size.some(FACTORS), size.seeds(SEEDS)
    return [Part("text", run, arms, factors=factors, seeds=seeds, tuning=1, extend=1, bytes=needed)]


def judge(results: Results) -> list[Finding]:
    text = results["text"]
    half, whole = (text.values(arm, metric="test loss") for arm in ("adan, half the steps", "adamw"))
    statement = "In half of AdamW's steps Adan reaches a test loss that is no higher."
    return [lower(statement, half, whole, "nats", names=("adan", "adamw"))]


def draw(results: Results) -> Any:
    figure, (axes,) = new_figure(1, 1, 6, 3.5)
    for arm in ("adamw", "adan, half the steps"):
        by_step(axes, results["text"], arm, "training loss")
    axes.set(ylabel="training loss, nats", title="Source text, transformer")
    axes.legend()
    return figure


CLAIM = Claim(
    name="adan",
    title="Adan reaches Adam's loss in half the steps, and tolerates large batches.",
    papers="Xie et al. 2022, arXiv:2208.06677",
    setting="a transformer of two blocks on source text, 600 steps, warm-up and cosine; 3 learning rates by 2 decays",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims adan --size large`",
)
