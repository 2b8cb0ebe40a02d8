"""How the best learning rate and a batch's curvature depend on its size, and what rates from curvature are worth."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import Split, digits
from benchmarks.claims.finding import Finding, alike, higher, lower
from benchmarks.claims.models import memory, perceptron
from benchmarks.claims.plots import COLOURS, band
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, evaluate, optimizer_of, outcome, token_loss, train
from benchmarks.pictures import new_figure
from lightning_optim.analysis import batch_eigenvalue, effective_batch, extreme_eigenvalues, hessian_noise
from lightning_optim.callbacks import CurvatureSchedule
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

BATCHES = (4, 16, 64, 256)
FACTORS = tuple(2.0**k for k in range(-5, 6))
LOOKED_AT = (16, 64, 256)  # sizes of batches whose Hessian is looked at; noise matters most at the first
SEEDS = 8
SLOPE = 0.2  # margin of an exponent
SHARE = 0.1  # margin of an eigenvalue, of itself
MARGIN = 0.05  # nats; by less a loss is no higher
TRAINED = 1.0  # nats on the training images, below which a learning rate trains; guessing is at 2.3
LEARNERS = {"median": "the median eigenvalue as the small one", "least": "the least eigenvalue as the small one"}
RULES = {"sgd": ("SGD", 1.0, "the batch size"), "adam": ("Adam", 0.5, "the root of the batch size")}


@dataclass(frozen=True)
class Digits:
    """Trains a perceptron on `images` digits, counted with repetition, in batches of the candidate's size."""

    width: int
    images: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_set, choose, _ = digits()
        steps = max(1, self.images // candidate.spec["batch"])
        model = perceptron(self.width).to(DEVICE)
        optimizer = optimizer_of(model, {"name": candidate.spec["name"]}, lr)
        losses = train(model, optimizer, train_set.batches(candidate.spec["batch"], seed), steps)
        held, _ = evaluate(model, choose.x, choose.y)
        fitted, _ = evaluate(model, train_set.x, train_set.y)
        found = outcome(losses, steps, **{"loss": held, "training loss": fitted})
        return Outcome(metrics=found.metrics)


@dataclass(frozen=True)
class Spectrum:
    """Trains a perceptron, then looks for the largest eigenvalue of the Hessian on all images and on batches.

    The noise κ is measured by products with random vectors on batches of 32 images, and the formula λ + κ / λ tells
    from it what batches of other sizes have. "law" is only that the excess over λ falls like 1 / B: what batches of 16
    have, from those of 64.
    """

    width: int
    steps: int
    draws: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images = digits()[0].to(DEVICE)
        model = perceptron(self.width).to(DEVICE)
        losses = train(model, optimizer_of(model, candidate.spec, lr), images.batches(50, seed), self.steps)
        whole = largest(model, images.x, images.y)
        noise = self.noise(model, images, seed) * effective_batch(32, len(images))
        found = {"all": whole}
        for size in LOOKED_AT:
            batches = images.batches(size, seed + 1)
            drawn = [largest(model, *next(batches)) for _ in range(self.draws)]
            found[f"batches of {size}"] = sum(drawn) / len(drawn)
            found[f"formula for {size}"] = batch_eigenvalue(whole, noise / effective_batch(size, len(images)))
        first, second = (effective_batch(size, len(images)) for size in LOOKED_AT[:2])
        excess = max(0.0, found[f"batches of {LOOKED_AT[1]}"] - whole)
        found["law"] = whole + excess * second / first
        return Outcome(metrics={"loss": losses[-1], **found})

    def noise(self, model: nn.Module, images: Split, seed: int) -> float:
        """κ of batches of 32, the mean over vectors."""
        params, batches = list(model.parameters()), images.batches(32, seed + 2)
        found = []
        for _ in range(4):
            z = [torch.randn_like(p) for p in params]
            norm = torch.cat([part.flatten() for part in z]).norm()
            products = []
            for x, y in itertools.islice(batches, 2 * self.draws):
                first = torch.autograd.grad(token_loss(model(x), y), params, create_graph=True)
                products.append(torch.autograd.grad(first, params, [part / norm for part in z]))
            found.append(hessian_noise(products))
        return sum(found) / len(found)


def largest(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The largest eigenvalue of the Hessian of the mean loss."""
    found = extreme_eigenvalues(lambda: token_loss(model(x), y), model.parameters(), products="autograd")
    return float(found[0])


class Module(LightningModule):
    """A perceptron with the optimizer of a spec."""

    def __init__(self, width: int, spec: Mapping[str, Any], lr: float) -> None:
        super().__init__()
        self.model, self.spec, self.lr = perceptron(width), spec, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return token_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return optimizer_of(self, self.spec, self.lr)


@dataclass(frozen=True)
class Learner:
    """Trains a perceptron with SGD with momentum, at constant rates or at those of `CurvatureSchedule`."""

    width: int
    steps: int
    every: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        train_set, choose, test = digits()
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        spec = dict(candidate.spec)
        small = spec.pop("small")
        callbacks: Any = [CurvatureSchedule(self.every, small=small)] if small else []
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(TensorDataset(train_set.x, train_set.y), 50, shuffle=True, generator=order)
        module = Module(self.width, spec, lr)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet.update(enable_model_summary=False, accelerator="gpu" if DEVICE == "cuda" else "cpu", devices=1)
        Trainer(max_steps=self.steps, max_epochs=-1, callbacks=callbacks, **quiet).fit(module, loader)
        held, _ = evaluate(module.model, choose.x, choose.y)
        tested, _ = evaluate(module.model, test.x, test.y)
        looks = callbacks[0].history if callbacks else [{"lr": lr, "momentum": spec["momentum"]}]
        rates = {f"last {name}": float(looks[-1][name]) for name in ("lr", "momentum")}
        return Outcome(metrics={"loss": held, "test loss": tested, **rates})


def parts(size: Size) -> list[Part]:
    width, some = size.wide(32), size.seeds(SEEDS)
    needed = memory(lambda: perceptron(width), 1000 * 30 * width, slots=24)
    rates = Digits(width, images=4 * size.long(2000))
    arms = [
        Arm(f"{name}, {batch}", lr, {"name": name, "batch": batch})
        for name, lr in (("sgd", 0.1), ("adam", 0.005))
        for batch in size.some(BATCHES)
    ]
    learner = Learner(width, size.long(600), every=size.long(25, 3))
    sgd = {"name": "sgd", "momentum": 0.9}
    tuned: dict[str, Any] = {"factors": size.some((0.1, 0.3, 1.0, 3.0)), "extend": 2, "tuning": 2 if size.whole else 1}
    learners = [Arm(name, 0.01, {**sgd, "small": name}) for name in LEARNERS]
    spectrum = Spectrum(width, size.long(200), draws=size.long(32))
    return [
        Part("rates", rates, arms, factors=size.some(FACTORS), seeds=some, bytes=needed),
        Part("spectrum", spectrum, [Arm("sgd", 0.05, {"name": "sgd"})], seeds=some, bytes=needed),
        Part("tuned", learner, [Arm("tuned", 0.05, {**sgd, "small": ""})], seeds=some, bytes=needed, **tuned),
        Part("learner", learner, learners, seeds=some, bytes=needed),
    ]


def best_rate(found: Measured, arm: str, seed: int) -> float:
    """The rate with the least loss on the images for choosing: of a parabola through the best and its neighbours."""
    rates = found.rates(arm)
    losses = [math.log(found.values(arm, lr)[seed]) for lr in rates]
    i = min(range(len(rates)), key=losses.__getitem__)
    if not 0 < i < len(rates) - 1:
        return rates[i]
    before, here, after = losses[i - 1 : i + 2]
    bend = before - 2 * here + after
    shift = (before - after) / (2 * bend) if bend > 0 else 0.0
    return rates[i] * (rates[i + 1] / rates[i]) ** shift


def largest_rate(found: Measured, arm: str, seed: int) -> float:
    """The largest rate that trains; the smallest of the grid where none does."""
    rates = found.rates(arm)
    return max((lr for lr in rates if found.values(arm, lr, "training loss")[seed] < TRAINED), default=rates[0])


def exponents(found: Measured, name: str, of: Any) -> dict[int, float]:
    """By seed the slope of log learning rate over log batch size."""
    arms = [arm for arm in found.part.arms if arm.spec["name"] == name]
    sizes = [math.log(arm.spec["batch"]) for arm in arms]

    def slope(seed: int) -> float:
        return linear_regression(sizes, [math.log(of(found, arm.name, seed)) for arm in arms]).slope

    return {seed: slope(seed) for seed in range(found.part.seeds)}


def judge(results: Results) -> list[Finding]:
    rates, spectrum = results["rates"], results["spectrum"]
    found = []
    for name, (said, rule, word) in RULES.items():
        for of, which in ((best_rate, "best"), (largest_rate, "largest trainable")):
            slopes = exponents(rates, name, of)
            told = f"The {which} learning rate of {said} grows with {word}: its exponent is {rule:g}."
            found.append(alike(told, slopes, rule, SLOPE, names=("exponent", "rule")))
    whole, size = spectrum.values("sgd", 0.05, "all"), LOOKED_AT[0]
    small = spectrum.values("sgd", 0.05, f"batches of {size}")
    told = f"The largest eigenvalue of the Hessian of {size} images is above that of all 1000."
    found.append(higher(told, small, whole, names=("batch", "all"), ratio=True))
    for metric, told in (
        (f"formula for {size}", "It lies where λ + κ / λ puts it, with κ from products with random vectors."),
        ("law", f"Its excess falls like 1 / B: it lies where that of {LOOKED_AT[1]} images puts it."),
    ):
        ratios = {seed: small[seed] / value for seed, value in spectrum.values("sgd", 0.05, metric).items()}
        found.append(alike(told, ratios, 1.0, SHARE, names=("measured over predicted", "predicted")))
    tuned = {seed: loss + MARGIN for seed, loss in results["tuned"].values("tuned", metric="test loss").items()}
    for name, said in LEARNERS.items():
        learner = results["learner"].values(name, 0.01, "test loss")
        told = f"The Lanczos learner with {said} loses less than {MARGIN:g} nats on the test images over a tuned rate."
        found.append(lower(told, learner, tuned, "nats", names=("learner", f"tuned and {MARGIN:g}")))
    return found


def draw(results: Results) -> Any:
    rates, spectrum = results["rates"], results["spectrum"]
    figure, (left, middle, right) = new_figure(1, 3, 10, 3.3)
    batches = sorted({arm.spec["batch"] for arm in rates.part.arms})
    seeds = range(rates.part.seeds)
    for (name, (said, rule, _)), colour in zip(RULES.items(), COLOURS, strict=False):
        columns = [[best_rate(rates, f"{name}, {batch}", seed) for seed in seeds] for batch in batches]
        band(left, batches, columns, said, marker="o", color=colour)
        first = sum(columns[0]) / len(columns[0])
        line = [first * (batch / batches[0]) ** rule for batch in batches]
        left.plot(batches, line, "--", color=colour, label=f"its rule, exponent {rule:g}")
    left.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="best learning rate")
    for which, label in (("batches of", "measured"), ("formula for", "formula")):
        columns = [list(spectrum.values("sgd", 0.05, f"{which} {size}").values()) for size in LOOKED_AT]
        band(middle, LOOKED_AT, columns, label, marker="o")
    whole = spectrum.mean("sgd", 0.05, "all")
    middle.axhline(whole, color="gray", linestyle=":", label="all 1000 images")
    middle.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="largest eigenvalue")
    shown = [results["tuned"].values("tuned", metric="test loss")]
    shown += [results["learner"].values(name, metric="test loss") for name in LEARNERS]
    for i, values in enumerate(shown):
        right.scatter([i] * len(values), list(values.values()))
    right.set(ylabel="test loss, nats", xlim=(-0.5, 2.5), yscale="log")
    right.set_xticks(range(3), ["tuned rate", *(f"learner,\n{name}" for name in LEARNERS)])
    middle.minorticks_off()
    for axes in (left, middle):
        axes.legend(fontsize=7)
    return figure


CLAIM = Claim(
    name="batch_size",
    title="The best learning rate grows with the batch size for SGD and with its root for adaptive methods.",
    papers="Granziol, Zohren & Roberts 2022, arXiv:2006.09092",
    setting="a perceptron of two hidden layers of width 32 on digits. Rates: 8 epochs without schedule or momentum in "
    "batches of 4 to 256, the same 11 learning rates at each size. Eigenvalues: after 200 steps, of 32 batches of a "
    "size. The learner: 600 steps of SGD with momentum, a look every 25 from lr 0.01, beside a constant learning rate "
    "with momentum 0.9, the best of 4 or more on 2 other seeds and other data. 8 seeds.",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims batch_size --size large`: width 256, 80 epochs.",
)
