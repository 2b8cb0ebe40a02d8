"""Whether Pre-LN needs no warm-up and Post-LN does, and how gradients depend on depth at initialization."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import source_text
from benchmarks.claims.finding import Finding, alike, lower
from benchmarks.claims.models import Transformer, memory
from benchmarks.claims.plots import band, by_rate, log_ticks
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import (
    DEVICE,
    cosine,
    on_text,
    optimizer_of,
    token_loss,
    warm_up,
)
from benchmarks.pictures import new_figure
from lightning_optim.analysis.blocks import find_stacks
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome
from lightning_optim.training.block_norms import Look

LENGTH, BATCH = 32, 16
DEPTHS = (4, 8, 16, 32)
FACTORS = (0.3, 1.0, 3.0)
SEEDS, FIRST_SEEDS = 5, 8  # of trainings, of networks that are only looked at
SLOPE_MARGIN, LOSS_MARGIN = 0.15, 0.1
NORMS = ("pre", "post")
WITH, WITHOUT = "with a warm-up", "without a warm-up"


@dataclass(frozen=True)
class FirstGradients:
    """Makes networks of several depths and reads the gradient of the last block's feed-forward output, without a step.

    The metrics are that norm at each depth, the mean square of the last block's output, and the slope of the logarithm
    of the norm against that of the depth.
    """

    depths: tuple[int, ...]
    width: int
    batches: int = 4

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        found: dict[str, float] = {}
        for depth in self.depths:
            torch.manual_seed(seed)
            model = Transformer(candidate.spec["norm"], depth=depth, width=self.width, length=LENGTH).to(DEVICE)
            look = Look(find_stacks(model), step=0)
            look.residuals.open()
            batches = source_text()[0].batches(BATCH, LENGTH, seed)
            for _ in range(self.batches):
                x, y = (tensor.to(DEVICE) for tensor in next(batches))
                look.begin_pass()
                look.read(look.params, torch.autograd.grad(token_loss(model(x), y), look.params))
            look.residuals.close()
            [profile] = look.profiles()
            found[f"norm at {depth}"] = profile.norms["feed_forward_output"][-1]
            found[f"residual at {depth}"] = profile.residual[-1]
        logs = [math.log(found[f"norm at {depth}"]) for depth in self.depths]
        slope = statistics.linear_regression([math.log(depth) for depth in self.depths], logs).slope
        return Outcome(metrics={"slope": slope, **found})


@dataclass(frozen=True)
class Training:
    """Trains a deep transformer on source text, with or without a warm-up for a third of the run, then a cosine."""

    depth: int
    width: int
    steps: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        model = Transformer(candidate.spec["norm"], depth=self.depth, width=self.width, length=LENGTH).to(DEVICE)
        optimizer = optimizer_of(model, {"name": "adamw"}, lr)
        rate = warm_up(1 / 3 if candidate.spec["warm_up"] else 0.0, cosine)
        return on_text(model, optimizer, self.steps, seed=seed, batch=BATCH, length=LENGTH, lr_at=rate)


def parts(size: Size) -> list[Part]:
    depths = DEPTHS if size.whole else DEPTHS[:2]
    look = FirstGradients(depths, width=size.wide(64, 8))
    run = Training(depth=6 if size.whole else 2, width=size.wide(32, 8), steps=size.long(300))
    arms = [
        Arm(f"{norm}, {told}", 3e-3, {"norm": norm, "warm_up": warm})
        for norm in NORMS
        for told, warm in ((WITH, True), (WITHOUT, False))
    ]
    numbers = 40 * BATCH * LENGTH * look.width * depths[-1]
    needed = memory(lambda: Transformer(depth=depths[-1], width=look.width), activations=numbers)
    at_first = [Arm(norm, spec={"norm": norm}) for norm in NORMS]
    return [
        Part("first gradients", look, at_first, metric="slope", seeds=size.seeds(FIRST_SEEDS), bytes=needed),
        Part("training", run, arms, factors=size.some(FACTORS), seeds=size.seeds(SEEDS), bytes=needed),
    ]


def judge(results: Results) -> list[Finding]:
    first, found = results["first gradients"], results["training"]
    losses = {arm.name: found.over_rates(arm.name) for arm in found.part.arms}
    allowed = {seed: loss + LOSS_MARGIN for seed, loss in losses[f"pre, {WITH}"].items()}
    names = ("measured", "theory")
    return [
        alike(
            "Pre-LN: at initialization the gradient norm of the last feed-forward output falls with the depth L as "
            "1/√L, an exponent of -1/2.",
            *(first.values("pre"), -0.5, SLOPE_MARGIN),
            names=names,
        ),
        alike(
            "Post-LN: it does not depend on the depth, an exponent of 0.",
            *(first.values("post"), 0.0, SLOPE_MARGIN),
            names=names,
        ),
        lower(
            "Post-LN has a lower test loss with a warm-up, in the mean over learning rates.",
            *(losses[f"post, {WITH}"], losses[f"post, {WITHOUT}"], "nats"),
            names=("with", "without"),
        ),
        lower(
            f"Pre-LN without one has a test loss of less than {LOSS_MARGIN} nats above that with.",
            *(losses[f"pre, {WITHOUT}"], allowed, "nats"),
            names=("without", f"with + {LOSS_MARGIN}"),
        ),
    ]


def draw(results: Results) -> Any:
    figure, (depth, pre, post) = new_figure(1, 3, 10, 3.4)
    first, found = results["first gradients"], results["training"]
    assert isinstance(first.part.run, FirstGradients)
    depths = first.part.run.depths
    for norm in NORMS:
        columns = [list(first.values(norm, metric=f"norm at {at}").values()) for at in depths]
        band(depth, depths, columns, f"{norm.capitalize()}-LN", marker="o", markersize=3)
    start = first.mean("pre", metric=f"norm at {depths[0]}")
    depth.plot(depths, [start * math.sqrt(depths[0] / at) for at in depths], "k:", label="1/√depth")
    depth.set(xscale="log", yscale="log", xlabel="number of blocks", ylabel="gradient norm, last block")
    log_ticks(depth, depths)
    depth.set_title("At initialization")
    post.sharey(pre)
    for norm, axes in (("pre", pre), ("post", post)):
        for told in (WITH, WITHOUT):
            by_rate(axes, found, f"{norm}, {told}", label=told)
        axes.set(ylabel="test loss, nats", title=f"{norm.capitalize()}-LN, trained")
    for axes in (depth, pre, post):
        axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    name="layer_norms",
    title="Pre-LN needs no warm-up, Post-LN does.",
    papers="Xiong et al. 2020, arXiv:2002.04745",
    setting=(
        "language models on source text: 4 to 32 blocks of width 64, 8 seeds, at initialization; 6 blocks of width 32 "
        "trained by AdamW for 300 steps, a warm-up of 100 or none, then a cosine; 3 learning rates by 5 seeds, all told"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
)
