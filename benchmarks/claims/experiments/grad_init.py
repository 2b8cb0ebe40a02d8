"""Whether GradInit lets deep nets train without a warm-up where their own initialization does not."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits, source_text
from benchmarks.claims.finding import Finding, lower
from benchmarks.claims.models import Transformer, memory, perceptron
from benchmarks.claims.plots import by_rate
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, on_text, optimizer_of, outcome, token_loss, train
from benchmarks.pictures import new_figure
from lightning_optim.callbacks import GradInit
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

LENGTH, BATCH, IMAGES = 32, 16, 64
FACTORS = (0.3, 1.0, 3.0)
SEEDS, CHEAP_SEEDS = 5, 8
DEFAULT, FREE = "as initialized", "GradInit, no bound"
BOUND = 500.0  # of the sum of absolute values of the gradient, which begins at 560
Batches = Iterator[tuple[Tensor, Tensor]]


class Fit(LightningModule):
    """A classifier with its loss and optimizer, for the callback."""

    def __init__(self, net: nn.Module, spec: Mapping[str, Any], lr: float) -> None:
        super().__init__()
        self.net, self.spec, self.lr = net, spec, lr

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return token_loss(self.net(x), y)

    @override
    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net, self.spec, self.lr)


def scale(fit: Fit, batches: Batches, **options: Any) -> dict[str, float]:
    """Let the callback scale a net's initial weights in a fit of no epochs, and return the ends of its scales."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    grad_init = GradInit(table=False, **options)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=0,
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        callbacks=[grad_init],
        enable_progress_bar=False,
        **quiet,
    )
    some: Any = list(islice(batches, 2 * grad_init.iterations))
    loader: Any = DataLoader(some, batch_size=None)
    trainer.fit(fit, loader)
    fit.net.to(DEVICE)
    scales = (grad_init.alphas or {}).values()
    return {"smallest scale": min(scales), "largest scale": max(scales)}


@dataclass(frozen=True)
class PostNorm:
    """Trains a Post-LN transformer on source text by AdamW, with a cosine and no warm-up."""

    depth: int
    width: int
    steps: int
    iterations: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        model = Transformer("post", depth=self.depth, width=self.width, length=LENGTH).to(DEVICE)
        spec, scales = {"name": "adamw"}, dict[str, float]()
        if gamma := candidate.spec["gamma"]:
            gamma = math.inf if gamma == "none" else gamma
            others = source_text()[0].batches(BATCH, LENGTH, seed + 500)
            scales = scale(Fit(model, spec, lr), others, gamma=gamma, iterations=self.iterations, lr=5e-3)
        run = {"seed": seed, "batch": BATCH, "length": LENGTH}
        return on_text(model, optimizer_of(model, spec, lr), self.steps, lr_at=cosine, **run, **scales)


@dataclass(frozen=True)
class Plain:
    """Trains a deep perceptron without normalization on digits by SGD with momentum; He's initialization."""

    depth: int
    width: int
    steps: int
    iterations: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images, _, test = digits()
        model = perceptron(self.width, self.depth)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        model.to(DEVICE)
        spec, scales = {"name": "sgd", "momentum": 0.9}, dict[str, float]()
        if candidate.spec["gamma"]:
            options = {"follow": "normalized_sgd", "gamma": candidate.spec["gamma"], "lr": 1e-2}
            others = images.batches(IMAGES, seed + 500)
            scales = scale(Fit(model, spec, lr), others, iterations=self.iterations, **options)
        losses = train(model, optimizer_of(model, spec, lr), images.batches(IMAGES, seed), self.steps, lr_at=cosine)
        tested, right = evaluate(model, test.x, test.y)
        return outcome(losses, self.steps, loss=tested, right=right, **scales)


def parts(size: Size) -> list[Part]:
    width, steps = size.wide(32, 8), size.long(300)
    post = PostNorm(depth=6 if size.whole else 2, width=width, steps=steps, iterations=150 if size.whole else 2)
    plain = Plain(depth=12, width=width, steps=steps, iterations=200 if size.whole else 2)
    arms = [Arm(DEFAULT, 3e-3, {"gamma": None}), Arm(FREE, 3e-3, {"gamma": "none"})]
    arms.append(Arm(f"GradInit, γ = {BOUND:g}", 3e-3, {"gamma": BOUND}))
    sides = [Arm(DEFAULT, 0.1, {"gamma": None}), Arm("GradInit, γ = 1", 0.1, {"gamma": 1.0})]
    needed = memory(
        lambda: Transformer("post", depth=post.depth, width=width),
        activations=3 * 40 * BATCH * LENGTH * width * post.depth,
        slots=8,
    )
    factors = size.some(FACTORS)
    return [
        Part("post", post, arms, factors=factors, seeds=size.seeds(SEEDS), bytes=needed),
        Part("plain", plain, sides, factors=factors, seeds=size.seeds(CHEAP_SEEDS)),
    ]


def judge(results: Results) -> list[Finding]:
    findings = []
    for part, what in (("post", "A Post-LN transformer"), ("plain", "A deep net without normalization")):
        found = results[part]
        default = found.over_rates(DEFAULT)
        for arm in found.part.arms[1:]:
            statement = (
                f"{what} without a warm-up has a lower test loss with {arm.name}, in the mean over learning rates."
            )
            findings.append(
                lower(statement, found.over_rates(arm.name), default, "nats", names=(arm.name.split(",")[0], DEFAULT))
            )
    return findings


def draw(results: Results) -> Any:
    figure, (post, plain) = new_figure(1, 2, 9, 3.6)
    for axes, part, title in ((post, "post", "Post-LN transformer, AdamW"), (plain, "plain", "12 layers, SGD")):
        for arm in results[part].part.arms:
            by_rate(axes, results[part], arm.name)
        axes.set(ylabel="test loss, nats", title=title)
        axes.legend(fontsize=8)
    return figure


CLAIM = Claim(
    name="grad_init",
    title="GradInit lets deep nets train without a warm-up where their own initialization does not.",
    papers="Zhu et al. 2021, arXiv:2102.08098",
    setting=(
        "a Post-LN transformer of 6 blocks of width 32 on source text, AdamW, GradInit of 150 iterations, 5 seeds; a "
        "perceptron of 12 hidden layers on digits, SGD with momentum, 200 iterations, 8 seeds; 300 steps with a "
        "cosine, no warm-up, 3 learning rates, all told"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims grad_init --size large`: width 256, 3000 steps, searches of 150 and 200",
)
