"""Whether KOALA, without a schedule, has the lower loss at any time of a run."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import TOKENS, digits, source_text
from benchmarks.claims.finding import Finding, higher, lower
from benchmarks.claims.models import CLASSES, Transformer, convolutional, memory
from benchmarks.claims.plots import by_step, log_ticks
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, Batches, cosine, evaluate, optimizer_of, outcome, spec_without, train
from benchmarks.pictures import new_figure
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
TIMES = 6  # the last is the whole run, each before it half as long
KOALAS, RIVALS = ("koala_v", "koala_m"), ("sgd", "adam")


class PerSample:
    """The mean cross-entropy of a batch, which keeps itself and the mean of the samples' squares for KOALA."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        each = cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(len(targets), -1).mean(1)
        self.kept = each.mean().item(), each.detach().square().mean().item()
        return each.mean()


class Travelled:
    """How far each step moves the parameters of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._weights: list[Any] = list(model.parameters())
        self._were = [p.detach().clone() for p in self._weights]
        self.lengths: list[float] = []

    @torch.no_grad()
    def measure(self) -> None:
        moved = torch._foreach_norm(torch._foreach_sub(self._weights, self._were))
        self.lengths.append(torch.stack(moved).norm().item())
        torch._foreach_copy_(self._were, self._weights)


@dataclass(frozen=True)
class Anytime:
    """Trains at a constant rate and looks at the loss at `TIMES` times: "loss" and "test loss" are means over these.

    Of `koala_m` these are losses at the weights that it predicts, where it also takes gradients. "correlation" is that
    of the logarithms of the loss and of the length of the step that it leads to.
    A candidate with `cosine` in its spec has a schedule that falls to 0 at the end of the run.
    """

    data: str
    width: int
    steps: int
    batch: int = 16
    length: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        model, batches, held, tested = self.problem(seed)
        spec = spec_without(candidate, "cosine")
        optimizer = optimizer_of(model, {"weight_decay": 0.0, **spec}, lr)
        times = sorted({max(1, self.steps >> i) for i in range(TIMES)})
        loss, travelled = PerSample(), Travelled(model)
        found: list[tuple[float, float]] = []

        def before(step: int) -> None:
            if getattr(optimizer, "inputs", ()):
                optimizer.set_loss(*loss.kept)

        def after(step: int) -> None:
            travelled.measure()
            if step + 1 in times:
                found.append((evaluate(model, *held)[0], evaluate(model, *tested)[0]))

        lr_at = cosine if candidate.spec.get("cosine") else None
        losses = train(model, optimizer, batches, self.steps, lr_at=lr_at, before=before, after=after, loss=loss)
        guess = math.log(TOKENS if self.data == "text" else CLASSES)
        found += [(guess, guess)] * (len(times) - len(found))  # of a run that has diverged
        columns = [list(column) for column in zip(*found, strict=True)]
        metrics = {"loss": statistics.fmean(columns[0]), "test loss": statistics.fmean(columns[1])}
        metrics |= {"last loss": columns[0][-1], "last test loss": columns[1][-1]}
        whole = outcome(losses, self.steps, **metrics, correlation=correlation(losses, travelled.lengths))
        return Outcome(metrics=whole.metrics, curves={"test loss": (list(map(float, times)), columns[1])})

    def problem(self, seed: int) -> tuple[nn.Module, Batches, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The model, its batches, and what it is validated and tested on."""
        if self.data == "text":
            model: nn.Module = Transformer(width=self.width, length=self.length)
            text, choose, test = source_text()
            held, tested = choose.windows(64, self.length), test.windows(128, self.length)
            return model.to(DEVICE), text.batches(self.batch, self.length, seed), held, tested
        model = convolutional(self.width, norm=True)
        images, held_images, test_images = digits()
        held, tested = (held_images.x, held_images.y), (test_images.x, test_images.y)
        return model.to(DEVICE), images.batches(self.batch, seed), held, tested


def correlation(losses: list[float], lengths: list[float]) -> float:
    """The correlation of the logarithms of losses and lengths of steps, of those that are neither 0 nor infinite."""
    pairs = [(a, b) for a, b in zip(losses, lengths, strict=False) if 0 < a < math.inf and 0 < b < math.inf]
    logs = [[math.log(value) for value in column] for column in zip(*pairs, strict=True)]
    if len(pairs) < 2 or min(statistics.pstdev(column) for column in logs) == 0:
        return 0.0
    return statistics.correlation(*logs)


def parts(size: Size) -> list[Part]:
    images = Anytime("digits", size.wide(8), size.long(600), batch=32)
    text = Anytime("text", size.wide(32, 8), size.long(400))
    sgd = {"name": "sgd", "momentum": 0.9}
    arms = [
        Arm("koala_v", 1.0, {"name": "koala_v"}),
        Arm("koala_m", 1.0, {"name": "koala_m"}),
        Arm("sgd", 0.1, sgd),
        Arm("adam", 3e-3, {"name": "adam"}),
    ]
    falling = [Arm("sgd", 0.1, {**sgd, "cosine": True})]
    needed = memory(lambda: Transformer(width=text.width), activations=40 * text.batch * text.length * text.width)
    needed_images = memory(lambda: convolutional(images.width, True), activations=64 * 8 * images.batch * images.width)
    found = []
    for run, tuning, seeds, size_of_run in ((images, 1 + size.whole, 8, needed_images), (text, 1, 5, needed)):
        terms: dict[str, Any] = {"factors": size.some(FACTORS), "tuning": tuning, "seeds": size.seeds(seeds)}
        terms |= {"extend": int(size.whole), "bytes": size_of_run}
        found += [
            Part(run.data, run, arms, **terms),
            Part(f"{run.data}, cosine", run, falling, metric="last loss", **terms),
        ]
    return found


def judge(results: Results) -> list[Finding]:
    found = []
    for data, what in (("digits", "On digits"), ("text", "On source text")):
        part = results[data]
        for rival, name in zip(RIVALS, ("SGD with momentum", "Adam"), strict=True):
            for koala in KOALAS:
                one, two = (part.values(arm, metric="test loss") for arm in (koala, rival))
                statement = f"{what} {koala} has at any time a lower loss than {name} at its best constant rate."
                found.append(lower(statement, one, two, "nats", names=(koala, rival)))
        falling = results[f"{data}, cosine"].values("sgd", metric="last test loss")
        last = part.values("koala_m", metric="last test loss")
        statement = f"{what} koala_m without a schedule ends lower than SGD with a cosine schedule."
        found.append(lower(statement, last, falling, "nats", names=("koala_m", "sgd, cosine")))
    lengths = results["digits"].values("koala_v", metric="correlation")
    statement = "Its steps shorten with the loss of the batch, on digits (so do those of others: see below)."
    names = ("correlation of koala_v", "none")
    return [*found, higher(statement, lengths, dict.fromkeys(lengths, 0.0), names=names)]


def draw(results: Results) -> Any:
    figure, axes = new_figure(1, 2, 9, 3.5)
    for at, data in zip(axes, ("digits", "text"), strict=True):
        for arm in (*KOALAS, *RIVALS):
            lr = results[data].best(arm).lr
            by_step(at, results[data], arm, "test loss", label=f"{arm}, lr {lr:.2g}", marker="o", markersize=3)
        by_step(at, results[f"{data}, cosine"], "sgd", "test loss", label="sgd, cosine", linestyle="dashed")
        at.set(xscale="log", ylabel="test loss, nats", title=data)
        log_ticks(at, results[data].curves("sgd", "test loss")[0][0])
        at.legend(fontsize=7)
    axes[0].set(yscale="log")
    return figure


CLAIM = Claim(
    name="koala",
    title="KOALA adapts to the loss, and does without a schedule.",
    papers="Davtyan et al. 2022, arXiv:2107.03331",
    setting="a convolutional net with batch norm on digits, 600 steps, 8 seeds; a transformer of two blocks on source "
    "text, 400 steps, 5 seeds; the mean loss at 6 times, each twice the one before; constant rates, 5 of each side",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims koala --size large`: width 8 times as large, 10 times the steps",
)
