"""Whether the loss settles while the weights approach no stationary point, as StationarityMonitor sees it."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits, source_text
from benchmarks.claims.finding import Finding, alike, higher, lower
from benchmarks.claims.models import Transformer, memory, perceptron
from benchmarks.claims.plots import COLOURS, band
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import optimizer_of, token_loss
from benchmarks.pictures import new_figure
from lightning_optim.callbacks import StationarityMonitor
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

SEEDS = 5
EPOCH = 1000  # batches
LENGTH, BATCH = 16, 16
SMALL = 0.05  # of the first: a gradient or a step below it is small, as the monitor has it
FLAT = 0.01  # of the loss: a change from window to window that does not matter
STEADY = 0.1  # of a step's length, from window to window
ORDER = ("still moving", "invariant measure reached", "approaching a stationary point", "undecided")


class Fitted(LightningModule):
    """A model with the cross-entropy of its logits."""

    def __init__(self, model: nn.Module, spec: Mapping[str, Any], lr: float) -> None:
        super().__init__()
        self.model, self.spec, self.lr = model, spec, lr

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return token_loss(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.model, self.spec, self.lr)


@dataclass(frozen=True)
class Watched:
    """Trains for long at a constant learning rate under a StationarityMonitor: "text", or "digits" in one batch."""

    data: str
    width: int
    windows: int
    window: int
    batches: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        if self.data == "text":
            model: nn.Module = Transformer(depth=1, width=self.width, length=LENGTH)
            batches = source_text()[0].batches(BATCH, LENGTH, seed)
            x, y = (torch.stack(part) for part in zip(*(next(batches) for _ in range(EPOCH)), strict=True))
        else:
            images = digits()[0]
            model = perceptron(0, depth=0)  # softmax regression
            x, y = images.x.expand(EPOCH, *images.x.shape), images.y.expand(EPOCH, len(images))
        monitor = StationarityMonitor(self.window, batches=self.batches, every=1, seed=seed)
        module = Fitted(model, candidate.spec, lr)
        quietly_fit(module, monitor, DataLoader(TensorDataset(x, y), batch_size=None, shuffle=True), self)
        return told(monitor, model)


def quietly_fit(module: Fitted, monitor: StationarityMonitor, loader: Any, run: Watched) -> None:
    """Fit, and print nothing: what the monitor says is in its history."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_steps=run.windows * run.window,
            max_epochs=-1,
            callbacks=[monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)


def told(monitor: StationarityMonitor, model: nn.Module) -> Outcome:
    """The evidence of the second half of the windows as metrics, and of all as curves."""
    found = [one for _, one in monitor.history]
    late = found[len(found) // 2 :]
    norms = []
    for one in found:
        assert one.gradient is not None
        assert one.first_gradient is not None
        norms.append(math.sqrt(max(one.gradient.square, 0.0) / one.first_gradient.square))
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    metrics = {
        "loss": found[-1].loss,
        "gradient": statistics.fmean(norms[len(norms) // 2 :]),
        "loss change": (late[-1].loss / late[0].loss - 1) / max(1, len(late) - 1),
        "slowdown": statistics.geometric_mean([one.slowdown for one in late]),
        "level": late[-1].level,
        "displacement": late[-1].displacement / size,
        "straightness": late[-1].straightness,
        **{f"says {verdict}": statistics.fmean(one.verdict == verdict for one in late) for verdict in ORDER},
    }
    steps = [float(step) for step, _ in monitor.history]
    curves = {"loss": [one.loss for one in found], "gradient": norms, "level": [one.level for one in found]}
    return Outcome(metrics=metrics, curves={name: (steps, values) for name, values in curves.items()})


def parts(size: Size) -> list[Part]:
    window, batches = (640, 64) if size.whole else (64, 8)  # the shortest that the monitor takes
    text = Watched("text", size.wide(16, 8), size.long(12, 3), window, batches)
    convex = Watched("digits", 0, size.long(6, 3), window, batches)
    arms = [Arm("SGD", 0.3, {"name": "sgd", "momentum": 0.9}), Arm("AdamW", 1e-2, {"name": "adamw"})]
    descent = [Arm("gradient descent", 0.5, {"name": "sgd"})]
    needed = memory(lambda: Transformer(width=text.width), activations=40 * BATCH * LENGTH * text.width)
    return [
        Part("text", text, arms, seeds=size.seeds(SEEDS), bytes=needed),
        Part("convex", convex, descent, seeds=size.seeds(SEEDS)),
    ]


def judge(results: Results) -> list[Finding]:
    text, convex = results["text"], results["convex"]
    found = []
    for name in ("SGD", "AdamW"):
        change, gradient, slowdown = (text.values(name, metric=m) for m in ("loss change", "gradient", "slowdown"))
        small = dict.fromkeys(gradient, SMALL)
        found += [
            alike(
                f"{name}: from window to window the loss changes by less than {FLAT:.0%}.",
                change,
                0.0,
                FLAT,
                names=("relative change", "none"),
            ),
            higher(
                f"{name}: the full gradient does not become small.",
                gradient,
                small,
                "of its first norm",
                names=("gradient", "small is"),
            ),
            alike(
                f"{name}: steps do not become shorter from window to window.",
                slowdown,
                1.0,
                STEADY,
                names=("ratio", "no change"),
            ),
        ]
    gradient = convex.values("gradient descent", metric="gradient")
    small = dict.fromkeys(gradient, SMALL)
    statement = "For comparison, gradient descent on softmax regression: the full gradient becomes small."
    found.append(lower(statement, gradient, small, "of its first norm", names=("gradient", "small is")))
    return found


def draw(results: Results) -> Any:
    figure, axes = new_figure(1, 3, 11, 3.4)
    arms = [("text", "SGD"), ("text", "AdamW"), ("convex", "gradient descent")]
    labels = {"loss": "mean training loss, nats", "gradient": "norm of the full gradient, of the first"}
    labels["level"] = "length of steps, of the first window's"
    for one, (curve, label) in zip(axes, labels.items(), strict=True):
        for (part, arm), colour in zip(arms, COLOURS, strict=False):
            curves = results[part].curves(arm, curve)
            columns = list(zip(*(ys for _, ys in curves), strict=True))
            band(one, list(curves[0][0]), columns, f"{arm}, {part}", color=colour)
        one.set(xlabel="step", ylabel=label, yscale="log" if curve != "loss" else "linear")
    axes[1].axhline(SMALL, color="gray", linestyle=":", label="small")
    axes[1].legend(fontsize=8)
    return figure


CLAIM = Claim(
    name="stationarity",
    title="The weights do not converge to a stationary point while the loss does.",
    papers="Zhang et al. 2022, arXiv:2110.06256",
    setting="a transformer of one block of width 16 on source text, 7680 steps at a constant rate, 12 windows of "
    "StationarityMonitor; for comparison full gradients on softmax regression of digits",
    parts=parts,
    judge=judge,
    draw=draw,
)
