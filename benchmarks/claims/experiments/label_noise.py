"""Whether PNM and AdaPNM generalise better where labels are wrong, and whether injected noise does the same."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import Split, digits
from benchmarks.claims.finding import Finding, lower
from benchmarks.claims.models import CLASSES, memory, perceptron
from benchmarks.claims.plots import COLOURS, band
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, evaluate, optimizer_of, outcome, train
from benchmarks.pictures import new_figure
from lightning_optim.core.foreign_stages import attach
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.grid import rounded
from lightning_optim.race.outcome import Outcome
from lightning_optim.stages import Noise

FACTORS = (0.1, 0.3, 1.0, 3.0)
RATE_SEEDS, SEEDS = 5, 8
VARIANCES = (1e-5, 1e-4, 1e-3)  # of injected noise, for an element of the gradient
WRONG = 0.4  # share of the training labels


def falling(share: float) -> float:
    """The schedule of the paper: a tenth after two fifths of the run, a hundredth after four."""
    return 1.0 if share < 0.4 else 0.1 if share < 0.8 else 0.01


def with_wrong_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """The labels, of which a share is another class of chance."""
    generator = torch.Generator().manual_seed(seed)
    other = (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES
    return torch.where(torch.rand(labels.shape, generator=generator) < share, other, labels)


@dataclass(frozen=True)
class Digits:
    """Trains a perceptron on digits of which many have wrong labels; `eta` is the variance of injected noise."""

    width: int
    steps: int
    wrong: float = WRONG
    batch: int = 64

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images, choose, test = digits()
        images = Split(images.x, with_wrong_labels(images.y, self.wrong, seed)).to(DEVICE)
        model = perceptron(self.width).to(DEVICE)
        spec = dict(candidate.spec)
        eta = spec.pop("eta", 0.0)
        optimizer = optimizer_of(model, spec, lr)
        if eta:
            indices = global_indices(model.named_parameters(), optimizer)
            attach(Noise(indices, "isotropic", eta, gamma=0.0, seed=seed), optimizer)
        losses = train(model, optimizer, images.batches(self.batch, seed), self.steps, lr_at=falling)
        held, held_right = evaluate(model, choose.x, choose.y)
        tested, right = evaluate(model, test.x, test.y)
        _, fitted = evaluate(model, images.x, images.y)
        told = {"error": 1 - held_right, "loss": held, "test loss": tested, "test error": 1 - right, "fitted": fitted}
        return replace(outcome(losses, self.steps, **told), curves={})


PAIRS = {"SGD": "PNM", "AdamW": "AdaPNM"}


def arms() -> list[Arm]:
    """Those of a pair have centres of equal mean steps, and decays that shrink weights alike."""
    root = math.sqrt(5)  # what PNM and AdaPNM divide a step by
    specs = {
        "SGD": (0.03, {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4}),
        "PNM": (0.03 * 10 * root, {"name": "pnm", "weight_decay": 5e-4 / root}),
        "AdamW": (1e-3, {"name": "adamw", "weight_decay": 0.01}),
        "AdaPNM": (1e-3 * root, {"name": "adapnm", "weight_decay": 0.01 / root}),
    }
    found = [Arm(name, rounded(lr), spec) for name, (lr, spec) in specs.items()]
    return found + [Arm(f"{name}, noise", *specs[name], {"eta": VARIANCES}) for name in PAIRS]


def parts(size: Size) -> list[Part]:
    run = Digits(size.wide(128), size.long(1500))
    needed = memory(lambda: perceptron(run.width), activations=1000 * run.width)
    terms: dict[str, Any] = {"metric": "error", "factors": size.some(FACTORS), "bytes": needed}
    tuned = [replace(arm, grid={key: size.some(values) for key, values in arm.grid.items()}) for arm in arms()]
    return [
        Part("tuned", run, tuned, seeds=size.seeds(SEEDS), tuning=size.seeds(2), extend=1, **terms),
        Part("rates", run, tuned, seeds=size.seeds(RATE_SEEDS), **terms),
    ]


def over_rates(found: Measured, arm: str) -> dict[int, float]:
    """The test error in the mean over learning rates, by seed; of injected noise at the variance that is best."""
    cells, grid = found.arm(arm).cells(), found.arm(arm).grid
    means = [found.over_rates(arm, "test error", **{key: cell.spec[key] for key in grid}) for cell in cells]
    return min(means, key=lambda mean: statistics.fmean(mean.values()))


def judge(results: Results) -> list[Finding]:
    tuned, rates = results["tuned"], results["rates"]
    found = []
    for inner, ours in PAIRS.items():
        for other, what in ((inner, inner), (f"{inner}, noise", f"{inner} with injected noise")):
            names = (ours, what)
            mine, theirs = (tuned.values(arm, metric="test error") for arm in (ours, other))
            found.append(lower(f"Tuned, {ours} has a lower test error than {what}.", mine, theirs, names=names))
            statement = f"Over all rates with equal mean steps, {ours} has a lower test error than {what}."
            found.append(lower(statement, over_rates(rates, ours), over_rates(rates, other), names=names))
    return found


def draw(results: Results) -> Any:
    figure, both = new_figure(1, 2, 9, 3.6)
    found = results["rates"]
    for axes, (inner, ours) in zip(both, PAIRS.items(), strict=True):
        colours = iter(COLOURS)
        for arm in (inner, ours, f"{inner}, noise"):
            for cell in found.arm(arm).cells():
                options = {key: cell.spec[key] for key in found.arm(arm).grid}
                lrs = found.rates(arm)
                columns = [list(found.values(arm, lr, "test error", **options).values()) for lr in lrs]
                label = f"{inner}, noise of variance {cell.spec['eta']:g}" if options else arm
                style = {"color": next(colours), "linestyle": ":" if options else "-"}
                band(axes, [lr / lrs[0] for lr in lrs], columns, label, marker="o", markersize=3, **style)
        axes.set(
            xscale="log",
            xlabel="mean step, in those of the lowest rate",
            ylabel="share of errors in the test",
            title=ours,
        )
        axes.legend(fontsize=7)
    return figure


CLAIM = Claim(
    name="label_noise",
    title="PNM and AdaPNM generalise better under label noise; injected isotropic noise does not do the same.",
    papers="Xie et al. 2021, arXiv:2103.17182",
    setting="a perceptron on 1000 digits, 40 % of them with a wrong label, 1500 steps in batches of 64, a rate that "
    "falls twice to a tenth; 4 learning rates, 3 variances of injected noise; the test labels are right",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims label_noise --size large`: width 1024, 15,000 steps",
)
