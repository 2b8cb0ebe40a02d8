"""Whether Adafactor matches Adam with sublinear memory, and whether clipped updates mend a slow second moment."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import source_text
from benchmarks.claims.finding import Finding, alike, higher, lower
from benchmarks.claims.models import Transformer, memory
from benchmarks.claims.plots import band, by_rate, by_step, log_ticks
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, train, warm_up
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome
from lightning_optim.reports.memory import predicted_memory

LENGTH, BATCH = 32, 16
FACTORS = (0.3, 1.0, 3.0)
SEEDS, CLIPPING_SEEDS = 8, 5
WIDTHS = (32, 64, 128, 256)  # at which state is counted
LOSS_MARGIN, EXPONENT_MARGIN = 0.05, 0.1
NEVER = 1e9  # a bound on updates that none reaches
PAPER = {"name": "adafactor", "mode": "paper", "relative_step": False}
DECAYS = {"slow": -1.0, "as in the paper": -0.8}  # the second moment decays at rate 1 - t^c; -1 is a mean of all steps


@dataclass(frozen=True)
class Training:
    """Trains a transformer on source text, with a warm-up for a share of the run, then a cosine."""

    norm: Literal["pre", "post"]
    depth: int
    width: int
    steps: int
    warm: float

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_text, choose, test = source_text()
        model = Transformer(self.norm, depth=self.depth, width=self.width, length=LENGTH).to(DEVICE)
        optimizer = optimizer_of(model, candidate.spec, lr)
        batches = train_text.batches(BATCH, LENGTH, seed)
        losses = train(model, optimizer, batches, self.steps, lr_at=warm_up(self.warm, cosine))
        held, _ = evaluate(model, *choose.windows(64, LENGTH))
        tested, _ = evaluate(model, *test.windows(256, LENGTH))
        return outcome(losses, self.steps, **{"loss": held, "test loss": tested})


@dataclass(frozen=True)
class State:
    """Counts the bytes of an optimizer's state for transformers of several widths; nothing is trained."""

    widths: tuple[int, ...]

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        found: dict[str, float] = {}
        logs: list[tuple[float, float]] = []
        for width in self.widths:
            model = Transformer(width=width, length=LENGTH)
            optimizer = optimizer_of(model, candidate.spec, 1e-3)
            count = sum(entry.bytes for entry in predicted_memory(optimizer) if entry.kind == "state")
            found[f"bytes at {width}"] = count
            logs.append((math.log(sum(p.numel() for p in model.parameters())), math.log(count)))
        slope = statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope
        return Outcome(metrics={"exponent": slope, **found})


def parts(size: Size) -> list[Part]:
    width, steps = size.wide(32, 8), size.long(300)
    text = Training("pre", depth=2, width=width, steps=steps, warm=0.1)
    clipping = Training("post", depth=4 if size.whole else 2, width=width, steps=steps, warm=0.0)
    sides = [Arm("AdamW", 1e-2, {"name": "adamw"}), Arm("Adafactor", 1e-1, PAPER)]
    arms = [
        Arm(clip_name(decay, d), 1e-2, {**PAPER, "scale_parameter": False, "beta2_decay": DECAYS[decay], "d": d})
        for decay in DECAYS
        for d in (1.0, NEVER)
    ]
    needed = memory(
        lambda: Transformer(depth=clipping.depth, width=width), activations=40 * BATCH * LENGTH * width * clipping.depth
    )
    factors, seeds = size.some(FACTORS), size.seeds(SEEDS)
    return [
        Part("text", text, sides, factors=factors, seeds=seeds, tuning=1, extend=1, bytes=needed),
        Part("clipping", clipping, arms, factors=factors, seeds=size.seeds(CLIPPING_SEEDS), bytes=needed),
        Part("state", State(size.some(WIDTHS)), sides, metric="exponent", seeds=size.seeds(CLIPPING_SEEDS)),
    ]


def clip_name(decay: str, d: float) -> str:
    """What an arm of the second part is called."""
    return f"decay {decay}, {'clipped' if d < NEVER else 'not clipped'}"


def judge(results: Results) -> list[Finding]:
    text, found = results["text"], results["clipping"]
    adamw = {seed: loss + LOSS_MARGIN for seed, loss in text.values("AdamW", metric="test loss").items()}
    losses = {(decay, d): found.over_rates(clip_name(decay, d), "test loss") for decay in DECAYS for d in (1.0, NEVER)}
    slow, fast = (
        {seed: losses[decay, NEVER][seed] - clipped for seed, clipped in losses[decay, 1.0].items()} for decay in DECAYS
    )
    return [
        lower(
            f"Adafactor has a test loss of less than {LOSS_MARGIN} nats above AdamW's, both tuned.",
            *(text.values("Adafactor", metric="test loss"), adamw, "nats"),
            names=("Adafactor", f"AdamW + {LOSS_MARGIN}"),
        ),
        alike(
            "Its state grows as the square root of the number of parameters when a model gets wider.",
            *(results["state"].values("Adafactor"), 0.5, EXPONENT_MARGIN),
            names=("exponent", "square root"),
        ),
        lower(
            "With a slow second moment and no warm-up, clipped updates lower the test loss, in the mean over "
            "learning rates.",
            *(losses["slow", 1.0], losses["slow", NEVER], "nats"),
            names=("clipped", "not clipped"),
        ),
        higher(
            "Clipping lowers it more with a slow second moment than with the paper's.",
            *(slow, fast, "nats"),
            names=("slow", "the paper's"),
        ),
    ]


def draw(results: Results) -> Any:
    figure, (losses, state, clipping) = new_figure(1, 3, 9.5, 3.4)
    widths = results["state"].part.settings["widths"]
    for name in ("AdamW", "Adafactor"):
        by_step(losses, results["text"], name, "training loss")
        columns = [list(results["state"].values(name, metric=f"bytes at {width}").values()) for width in widths]
        band(state, widths, columns, name, marker="o", markersize=3)
    losses.set(ylabel="training loss, nats", title="Pre-LN, each at its best rate")
    state.set(xscale="log", yscale="log", xlabel="width", ylabel="state, bytes", title="State, two blocks")
    log_ticks(state, widths)
    for arm in results["clipping"].part.arms:
        style = {} if arm.spec["d"] < NEVER else {"linestyle": "--"}
        by_rate(clipping, results["clipping"], arm.name, "test loss", **style)
    clipping.set(ylabel="test loss, nats", title="Post-LN without a warm-up")
    for axes in (losses, state, clipping):
        axes.legend(fontsize=7)
    return figure


CLAIM = Claim(
    name="adafactor",
    title="Adafactor matches Adam with sublinear memory; clipped updates mend a slow second moment.",
    papers="Shazeer & Stern 2018, arXiv:1804.04235",
    setting=(
        "language models of width 32 on source text, 300 steps: 2 Pre-LN blocks with a warm-up, 3 learning rates, "
        "8 seeds; 4 Post-LN blocks without one, 3 rates by 5 seeds, all told; state of widths 32 to 256"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
)
