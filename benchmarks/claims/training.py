"""A training loop without a Trainer, which all experiments share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.claims.data import source_text
from lightning_optim import create_optimizer
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome, thinned

LOST = 3.0  # a run whose loss is so many times that of the first step, or not finite, has diverged
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Batches = Iterator[tuple[Tensor, Tensor]]
Hook = Callable[[int], object]


def optimizer_of(model: nn.Module, spec: Mapping[str, Any], lr: float) -> Any:
    """The optimizer of a spec, for a model, at a learning rate."""
    return create_optimizer({**spec, "lr": lr}, model)


def spec_without(candidate: Candidate, *names: str) -> dict[str, Any]:
    """The spec of a candidate's optimizer, without what the run alone reads."""
    return {key: value for key, value in candidate.spec.items() if key not in names}


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of logits of any number of axes, the last of classes."""
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def train(
    model: nn.Module,
    optimizer: Any,
    batches: Batches,
    steps: int,
    *,
    lr_at: Callable[[float], float] | None = None,
    before: Hook | None = None,
    after: Hook | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = token_loss,
) -> list[float]:
    """Train, and return the loss of each step; fewer than `steps` of a run that has diverged.

    Optimizers that read the loss get it. Schedule-Free ones are left in training mode: call `optimizer.eval()`.

    Args:
        model: Maps inputs to logits. Batches are moved to the device of its parameters.
        optimizer: Of its parameters.
        batches: Inputs and targets.
        steps: Number of steps.
        lr_at: Factor on learning rates at a share of the run from 0 to 1; by default it is constant.
        before: Called with the step, from 0, between the gradient and the optimizer's step.
        after: Called with the step, from 0, after the optimizer's step.
        loss: Of logits and targets.
    """
    model.train()
    device = next(model.parameters()).device
    base = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    for step in range(steps):
        x, y = (tensor.to(device) for tensor in next(batches))
        optimizer.zero_grad()
        found = loss(model(x), y)
        torch.autograd.backward(found)
        losses.append(found.item())
        if not math.isfinite(losses[-1]) or losses[-1] > LOST * losses[0]:
            return losses
        if lr_at is not None:
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * lr_at(step / steps)
        if getattr(optimizer, "inputs", ()):
            optimizer.set_loss(losses[-1])
        if before is not None:
            before(step)
        optimizer.step()
        if after is not None:
            after(step)
    return losses


def cosine(share: float) -> float:
    """A learning rate that falls to zero along half a cosine."""
    return (1 + math.cos(math.pi * share)) / 2


def warm_up(share_of_run: float, then: Callable[[float], float] = lambda share: 1.0) -> Callable[[float], float]:
    """A learning rate that first rises along a line for a share of the run."""

    def at(share: float) -> float:
        return min(1.0, (share + 1e-3) / share_of_run) * then(share) if share_of_run else then(share)

    return at


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the share of right predictions, in evaluation mode.

    The loss of a model that has diverged is at most that of guessing each class alike, so that means over seeds exist.
    """
    was_training, device = model.training, next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    model.eval()
    logits = model(x)
    model.train(was_training)
    found = token_loss(logits, y).item()
    guess = math.log(logits.shape[-1])
    right = (logits.argmax(-1) == y).float().mean().item()
    return (min(found, guess) if math.isfinite(found) else guess), right


def outcome(losses: Sequence[float], steps: int, **metrics: float) -> Outcome:
    """What a run returns: metrics by name, and the training loss of each step as a curve.

    "training loss" is the mean over the last tenth of the steps; of a run that diverged the loss of its first step.
    "finished" is 1 where all steps were done, else 0.
    """
    whole = len(losses) == steps and math.isfinite(losses[-1])
    last = losses[-max(1, steps // 10) :]
    training = sum(last) / len(last) if whole else losses[0]
    finite = [x for x in losses if math.isfinite(x)]
    found = {"training loss": min(training, losses[0]), "finished": float(whole), **metrics}
    return Outcome(metrics=found, curves={"training loss": thinned((list(range(1, len(finite) + 1)), finite), 60)})


def on_text(
    model: nn.Module,
    optimizer: Any,
    steps: int,
    *,
    seed: int,
    batch: int,
    length: int,
    lr_at: Callable[[float], float],
    **metrics: float,
) -> Outcome:
    """Train a model of language on source text, and return its loss on the test text beside other metrics.

    Args:
        model: The model.
        optimizer: Of its parameters.
        steps: The number of steps.
        seed: Of the batches.
        batch: The number of windows of a batch.
        length: The number of tokens of a window.
        lr_at: As in `train`.
        metrics: Other metrics, by name.
    """
    train_text, _, test = source_text()
    losses = train(model, optimizer, train_text.batches(batch, length, seed), steps, lr_at=lr_at)
    tested, _ = evaluate(model, *test.windows(256, length))
    return outcome(losses, steps, loss=tested, **metrics)
