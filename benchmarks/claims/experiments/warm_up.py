"""Whether RAdam and the untuned warm-up do what a tuned one does; the variance of Adam's rate by RAdam's formula."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import source_text
from benchmarks.claims.finding import Finding, alike, lower
from benchmarks.claims.models import Transformer, memory
from benchmarks.claims.plots import by_rate, by_step
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
from lightning_optim import Adam
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome
from lightning_optim.training.warmups import WARMUPS

LENGTH, BATCH = 32, 16
BETA2 = 0.98  # of the trainings: the untuned warm-up takes 2 / (1 - beta2) = 100 steps
BETA2_OF_VARIANCE = 0.999
FACTORS = (0.3, 1.0, 3.0)
SEEDS = 5
COMPARED = (10, 20, 50, 100)  # steps at which variances are compared
POOL, REPEATS, ELEMENTS = 256, 100, 1000
NONE, UNTUNED, RADAM = "Adam, no warm-up", "Adam, untuned warm-up", "RAdam"
TUNED = {0.1: "Adam, 10 % warm-up", 0.3: "Adam, 30 % warm-up"}
LOSS_MARGIN, NORMAL_MARGIN, REAL_MARGIN = 0.1, math.log(1.1), math.log(2.0)


@dataclass(frozen=True)
class Training:
    """Trains a Post-LN transformer on source text; the warm-up of a candidate's spec is multiplied by a cosine."""

    depth: int
    width: int
    steps: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        model = Transformer("post", depth=self.depth, width=self.width, length=LENGTH).to(DEVICE)
        optimizer = optimizer_of(model, {"name": candidate.spec["name"], "betas": (0.9, BETA2)}, lr)
        rate = self.rate(candidate.spec["warm_up"])
        return on_text(model, optimizer, self.steps, seed=seed, batch=BATCH, length=LENGTH, lr_at=rate)

    def rate(self, warm: float | str) -> Callable[[float], float]:
        """The factor on the learning rate at a share of the run, for a warm-up of a share of it, or an untuned one."""
        if isinstance(warm, str):
            return lambda share: WARMUPS[warm](round(share * self.steps) + 1, BETA2) * cosine(share)
        return warm_up(warm, cosine)


@dataclass(frozen=True)
class Variance:
    """The variance of Adam's adaptive rate over many samples of the first gradients, parameters standing still.

    Gradients are normal numbers, or those of a transformer at initialization on random batches; `elements` of them,
    each divided by the root of its mean square. The adaptive rate of an element is √((1 - β₂ᵗ) / vₜ).
    """

    elements: int
    repeats: int
    pool: int
    steps: int
    width: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        generator = torch.Generator().manual_seed(seed)
        pool = self.gradients(seed) if candidate.spec["gradients"] == "transformer" else None
        shape = (self.repeats, self.elements if pool is None else pool.shape[1])
        param = nn.Parameter(torch.zeros(shape))
        optimizer = Adam([param], lr=0.0, betas=(0.9, BETA2_OF_VARIANCE))
        found: dict[int, float] = {}
        for t in range(1, self.steps + 1):
            drawn = torch.randint(self.pool, (self.repeats,), generator=generator)
            param.grad = torch.randn(shape, generator=generator) if pool is None else pool[drawn]
            optimizer.step()
            if t >= COMPARED[0]:
                square = optimizer.state[param]["exp_avg_sq"].double() / (1 - BETA2_OF_VARIANCE**t)
                found[t] = square.rsqrt().var(0).mean().item()
        ratios = [math.log(found[t] / variance(t, BETA2_OF_VARIANCE)) for t in COMPARED if t in found]
        return Outcome(
            metrics={"log ratio": statistics.fmean(ratios)},
            curves={"variance": ([float(t) for t in found][::6], list(found.values())[::6])},
        )

    def gradients(self, seed: int) -> Tensor:
        """Gradients of a transformer at initialization, of shape (pool, elements), of mean square 1 each element."""
        torch.manual_seed(seed)
        model = Transformer("post", depth=2, width=self.width, length=LENGTH).to(DEVICE)
        params = [p for p in model.blocks.parameters() if p.ndim == 2]
        chosen = torch.randperm(sum(p.numel() for p in params))[: self.elements].to(DEVICE)
        batches, rows = source_text()[0].batches(BATCH, LENGTH, seed), []
        for _ in range(self.pool):
            x, y = (tensor.to(DEVICE) for tensor in next(batches))
            grads = torch.autograd.grad(token_loss(model(x), y), params)
            rows.append(torch.cat([g.flatten() for g in grads])[chosen].cpu())
        pool = torch.stack(rows)
        size = pool.square().mean(0).sqrt()
        return pool[:, size > 0] / size[size > 0]


def variance(t: int, beta2: float) -> float:
    """RAdam's variance of the adaptive rate at step `t`, of gradients with mean 0 and variance 1.

    The rate is the root of ρ / χ² with ρ degrees of freedom, ρ the length of the moving average; it takes ρ above 2.
    """
    rho = 2 / (1 - beta2) - 1 - 2 * t * beta2**t / (1 - beta2**t)
    mean = math.sqrt(rho / 2) * math.exp(math.lgamma((rho - 1) / 2) - math.lgamma(rho / 2))
    return rho / (rho - 2) - mean * mean


def parts(size: Size) -> list[Part]:
    run = Training(depth=6 if size.whole else 2, width=size.wide(32, 8), steps=size.long(300))
    arms = [
        Arm(NONE, 3e-3, {"name": "adam", "warm_up": 0.0}),
        *(Arm(name, 3e-3, {"name": "adam", "warm_up": share}) for share, name in TUNED.items()),
        Arm(UNTUNED, 3e-3, {"name": "adam", "warm_up": "linear"}),
        Arm(RADAM, 3e-3, {"name": "radam", "warm_up": 0.0}),
    ]
    needed = memory(
        lambda: Transformer("post", depth=run.depth, width=run.width),
        activations=40 * BATCH * LENGTH * run.width * run.depth,
    )
    few = 1 if size.whole else 10
    look = Variance(ELEMENTS // few, REPEATS // few, POOL // (few * few), COMPARED[-1] // few, size.wide(32, 8))
    kinds = [Arm(kind, spec={"gradients": kind}) for kind in ("normal", "transformer")]
    seeds = size.seeds(SEEDS)
    return [
        Part("training", run, arms, factors=size.some(FACTORS), seeds=seeds, bytes=needed),
        Part("variance", look, kinds, metric="log ratio", seeds=seeds, bytes=needed),
    ]


def judge(results: Results) -> list[Finding]:
    losses = {arm.name: results["training"].over_rates(arm.name) for arm in results["training"].part.arms}
    tuned = min(TUNED.values(), key=lambda name: statistics.fmean(losses[name].values()))
    ratios = {kind: results["variance"].values(kind) for kind in ("normal", "transformer")}
    words = ("log of measured / formula", "formula")
    over = "in the mean over learning rates"
    return [
        lower(
            f"RAdam has a lower test loss than Adam without a warm-up, {over}.",
            *(losses[RADAM], losses[NONE], "nats"),
            names=(RADAM, NONE),
        ),
        alike(
            f"RAdam has the test loss of Adam with a tuned warm-up, {over}.",
            *(losses[RADAM], losses[tuned], LOSS_MARGIN, "nats"),
            names=(RADAM, tuned),
        ),
        alike(
            f"So has Adam with the untuned warm-up of 2 / (1 - β₂) steps, {over}.",
            *(losses[UNTUNED], losses[tuned], LOSS_MARGIN, "nats"),
            names=(UNTUNED, tuned),
        ),
        alike(
            "For normal gradients the variance of the adaptive rate in steps 10 to 100 is that of RAdam's formula, "
            "within 10 %.",
            *(ratios["normal"], 0.0, NORMAL_MARGIN),
            names=words,
        ),
        alike(
            "For gradients of a transformer at initialization it is so within a factor of 2.",
            *(ratios["transformer"], 0.0, REAL_MARGIN),
            names=words,
        ),
    ]


def draw(results: Results) -> Any:
    figure, (rates, variances) = new_figure(1, 2, 9, 3.6)
    for arm in results["training"].part.arms:
        by_rate(rates, results["training"], arm.name)
    rates.set(ylabel="test loss, nats", title="Post-LN transformer, source text")
    for kind in ("normal", "transformer"):
        by_step(variances, results["variance"], kind, "variance", label=f"{kind} gradients")
    steps = list(range(6, COMPARED[-1] + 1))
    variances.plot(steps, [variance(t, BETA2_OF_VARIANCE) for t in steps], "k:", label="RAdam's formula")
    variances.set(yscale="log", ylabel="variance of the adaptive rate", title=f"β₂ = {BETA2_OF_VARIANCE}")
    for axes in (rates, variances):
        axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    name="warm_up",
    title="RAdam and the untuned warm-up need no tuned warm-up.",
    papers="Liu et al. 2019, arXiv:1908.03265; Ma & Yarats 2019, arXiv:1910.04209",
    setting=(
        "a Post-LN transformer of 6 blocks of width 32 on source text, 300 steps, β₂ 0.98, a cosine after the warm-up, "
        "3 learning rates by 5 seeds, all told; variances at β₂ 0.999 over 100 samples of gradients, 5 seeds"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims warm_up --size large`: width 256, 3000 steps",
)
