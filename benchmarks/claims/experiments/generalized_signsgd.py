"""Whether generalized SignSGD trains an LSTM without the clipping that SGD needs."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import source_text
from benchmarks.claims.finding import Finding, alike, higher, lower
from benchmarks.claims.models import Recurrent, memory
from benchmarks.claims.plots import by_rate
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, spec_without, token_loss, train
from benchmarks.pictures import new_figure
from lightning_optim.analysis import extreme_eigenvalues
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = 5
MARGIN = 0.02  # nats, between runs with and without clipping
MOST_NORM = 0.25  # of the paper's language model, an LSTM on the Penn Treebank
POINTS = 12
SGD, SGD_CLIP, SIGN, SIGN_CLIP = "SGD", "SGD, clipped", "SignSGD", "SignSGD, clipped"


@dataclass(frozen=True)
class Language:
    """Trains an LSTM on source text with a cosine schedule; `clip` of a candidate is its largest norm of gradients."""

    width: int
    steps: int
    depth: int = 2
    batch: int = 16
    length: int = 64

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_text, choose, test = source_text()
        spec = spec_without(candidate, "clip")
        most = candidate.spec.get("clip", math.inf)
        model = Recurrent(self.width, self.depth).to(DEVICE)
        optimizer = optimizer_of(model, {**spec, "weight_decay": 0.0}, lr)
        norms: list[float] = []

        def clip(step: int) -> None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), most).item())

        batches = train_text.batches(self.batch, self.length, seed)
        losses = train(model, optimizer, batches, self.steps, lr_at=cosine, before=clip)
        held, _ = evaluate(model, *choose.windows(64, self.length))
        tested, _ = evaluate(model, *test.windows(128, self.length))
        clipped = statistics.fmean(norm > MOST_NORM for norm in norms)
        found = outcome(losses, self.steps, **{"loss": held, "test loss": tested, "share clipped": clipped})
        return Outcome(metrics=found.metrics)


@dataclass(frozen=True)
class Smoothness:
    """Trains alike at a constant rate, and measures at `POINTS` times how the curvature goes with the gradient.

    The curvature is the largest magnitude of an eigenvalue of the Hessian, on windows that are the same at each time.
    In the theory it is at most L0 + L1 times the norm of the gradient, and grows with that where it is not bounded.
    """

    width: int
    steps: int
    depth: int = 2
    batch: int = 16
    length: int = 64
    windows: int = 8

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_text, choose, _ = source_text()
        model = Recurrent(self.width, self.depth).to(DEVICE)
        optimizer = optimizer_of(model, candidate.spec, lr)
        x, y = (tensor.to(DEVICE) for tensor in choose.windows(self.windows, self.length))
        every = max(1, self.steps // POINTS)
        norms: list[float] = []
        curvatures: list[float] = []

        def measure(step: int) -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
            if step % every:
                return
            params = list(model.parameters())
            gradients = torch.autograd.grad(token_loss(model(x), y), params)
            found = extreme_eigenvalues(lambda: token_loss(model(x), y), params, steps=12, products="differences")
            norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
            curvatures.append(max(found.largest.abs().max().item(), found.smallest.abs().max().item()))

        train(model, optimizer, train_text.batches(self.batch, self.length, seed), self.steps, before=measure)
        logs = [[math.log(value) for value in values] for values in (norms, curvatures)]
        order = sorted(range(len(norms)), key=norms.__getitem__)
        curve = [norms[i] for i in order], [curvatures[i] for i in order]
        return Outcome(metrics={"correlation": statistics.correlation(*logs)}, curves={"curvature": curve})


def parts(size: Size) -> list[Part]:
    run = Language(width=size.wide(48), steps=size.long(300))
    sgd, sign = {"name": "sgd", "momentum": 0.9}, {"name": "generalized_signsgd"}
    arms = [
        Arm(SGD, 1.0, sgd),
        Arm(SGD_CLIP, 1.0, {**sgd, "clip": MOST_NORM}),
        Arm(SIGN, 6e-4, sign),
        Arm(SIGN_CLIP, 6e-4, {**sign, "clip": MOST_NORM}),
    ]
    needed = memory(
        lambda: Recurrent(run.width, run.depth), activations=12 * run.depth * run.batch * run.length * run.width
    )
    factors, seeds = size.some(FACTORS), size.seeds(SEEDS)
    smooth = Smoothness(run.width, size.long(180, least=2 * POINTS if size.whole else 3))
    return [
        Part("text", run, arms, factors=factors, seeds=seeds, bytes=needed),
        Part("smoothness", smooth, [Arm("SGD", 1.0, {**sgd, "weight_decay": 0.0})], "correlation", "max", seeds=seeds),
    ]


def _gain(text: Measured, arm: str, clipped: str) -> dict[int, float]:
    """By seed what clipping lowers the test loss by at the largest learning rate that both have tried."""
    lr = text.rates(arm)[-1]
    without, with_clip = (text.values(name, lr, "test loss") for name in (arm, clipped))
    return {seed: without[seed] - with_clip[seed] for seed in without}


def judge(results: Results) -> list[Finding]:
    text = results["text"]
    loss = {arm.name: text.values(arm.name, metric="test loss") for arm in text.part.arms}
    gains = _gain(text, SGD, SGD_CLIP), _gain(text, SIGN, SIGN_CLIP)
    correlation = results["smoothness"].values("SGD")

    def less(statement: str, one: str, other: str) -> Finding:
        return lower(statement, loss[one], loss[other], "nats", names=(one, other))

    return [
        higher(
            "The curvature of the LSTM grows with its gradient along the run: its smoothness is not bounded.",
            correlation,
            dict.fromkeys(correlation, 0.0),
            names=("correlation of their logarithms", "none"),
        ),
        less("SGD needs clipping: with it it loses less, each at its best rate.", SGD_CLIP, SGD),
        alike(
            "Generalized SignSGD loses as much without clipping as with it.",
            loss[SIGN],
            loss[SIGN_CLIP],
            MARGIN,
            "nats",
            names=(SIGN, SIGN_CLIP),
        ),
        higher(
            "At the largest rate clipping helps SGD more than it helps generalized SignSGD.",
            *gains,
            "nats",
            names=("gain of SGD", "gain of SignSGD"),
        ),
        less("Without clipping generalized SignSGD loses less than SGD.", SIGN, SGD),
        less("Without clipping it loses less than SGD with clipping.", SIGN, SGD_CLIP),
    ]


def draw(results: Results) -> Any:
    from matplotlib.ticker import NullFormatter

    figure, axes = new_figure(1, 3, 10, 3.3)
    text, smooth = results["text"], results["smoothness"]
    for at, arms in zip(axes, ((SGD, SGD_CLIP), (SIGN, SIGN_CLIP)), strict=False):
        for arm in arms:
            by_rate(at, text, arm, "test loss")
        at.set(ylabel="test loss, nats")
        at.legend(fontsize=8)
    axes[1].sharey(axes[0])
    for norms, curvatures in smooth.curves("SGD", "curvature"):
        axes[2].plot(norms, curvatures, "o", markersize=3, alpha=0.7)
    axes[2].set(
        xscale="log", yscale="log", xlabel="norm of the gradient", ylabel="curvature", title="along runs of SGD"
    )
    axes[2].xaxis.set_minor_formatter(NullFormatter())
    axes[2].set_xticks([0.1, 0.2, 0.4], ["0.1", "0.2", "0.4"])
    return figure


CLAIM = Claim(
    name="generalized_signsgd",
    title="Generalized SignSGD needs no clipping where SGD does.",
    papers="Crawshaw et al. 2022, arXiv:2208.11195",
    setting=f"an LSTM of two layers on source text, 300 steps, cosine schedule; clipping at {MOST_NORM}; "
    "5 learning rates, 5 seeds of each; each side's best rate by the loss on validation text",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims generalized_signsgd --size large`: width 8 times as large, 10 times the steps",
)
