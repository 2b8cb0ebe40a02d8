"""Measures what this package adds to a step in a real Trainer: `python -m benchmarks.trainer_overhead --budget 600`.

Two models, the digits of `examples/digits` and a language model with 10 million parameters on bytes, are trained
repeatedly for a few steps: with `torch.optim.AdamW(fused=True)`, with AdamW of this package, and with that and each
callback of `lightning_optim.callbacks`. The fits alternate. Each fit yields three times: from one batch to the next, of
the optimizer's step without forward and backward pass, and of the hooks of our callbacks as Lightning's profiler sees
them. In addition, both optimizers step on the same number of tensors with one element each, which shows the cost of a
step with nothing to compute. Each fit is saved at once, and the same command continues where the budget ended.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.cpu_contenders import base, ours
from benchmarks.pages import RESULTS, table, write_part
from benchmarks.pairs import measure
from benchmarks.records import Record, commit, describe, load, machine, save
from benchmarks.train_quality import LanguageModel, PythonSources
from examples.digits.digits import DigitsClassifier, DigitsData
from lightning_optim import ConfiguredOptimizer, OptimizerSpec, callbacks

SKIPPED = 2  # first steps of a fit, which make the state
LR = 1e-4
TORCH = "torch AdamW fused"
OURS = "ours AdamW"

# Arguments of callbacks where the defaults do not do, or do nothing in each step; None for one that needs more ranks.
ARGUMENTS: dict[str, dict[str, Any] | None] = {
    "BatchSizeScaling": {"reference_batch": 32, "batch_size": 64},
    "Communication": None,
    "GradInit": {"gamma": math.inf, "iterations": 1, "table": False},
    "IterateAveraging": {"kind": "ema"},
    "OptimizerStateMemory": {"table": False},
}


@dataclass(frozen=True)
class Setting:
    """What a fit is run with.

    Attributes:
        label: For tables.
        optimizer: What the module's hyperparameter says; None for torch's fused AdamW.
        callbacks: What makes the callbacks.
    """

    label: str
    optimizer: OptimizerSpec | None
    callbacks: tuple[Callable[[], Callback], ...] = field(default=())


def settings(names: Sequence[str]) -> list[Setting]:
    """torch's AdamW, ours, and ours with each of these callbacks and with all of them."""
    spec: dict[str, Any] = {"name": "adamw", "lr": LR}
    makers = {name: maker for name in names if (maker := _maker(name)) is not None}
    averaging = [Setting(f"{TORCH} + {name}", None, (makers[name],)) for name in makers if name == "IterateAveraging"]
    return [
        Setting(TORCH, None),
        Setting(OURS, spec),
        Setting(f"{OURS}, 8 bits", {**spec, "state_bits": 8}),
        *(Setting(f"{OURS} + {name}", spec, (maker,)) for name, maker in makers.items()),
        *averaging,
    ]


def _maker(name: str) -> Callable[[], Callback] | None:
    given = ARGUMENTS.get(name, {})
    return None if given is None else functools.partial(getattr(callbacks, name), **given)


# ---------------------------------------------------------------------------------------------- jobs


class Replaceable(ConfiguredOptimizer, LightningModule):
    """A module whose optimizer may be torch's."""

    by_torch = False

    def configure_optimizers(self) -> Any:
        if self.by_torch:
            return torch.optim.AdamW(self.parameters(), lr=LR, fused=True)
        return super().configure_optimizers()


class Digits(Replaceable, DigitsClassifier):
    """The digits of the examples."""


class Language(Replaceable):
    """The next byte of Python's standard library."""

    def __init__(self, optimizer: OptimizerSpec = "adamw", width: int = 640) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = LanguageModel(width, PythonSources.length)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        text, following = batch
        loss = cross_entropy(self.net(text).flatten(0, -2), following.flatten())
        self.log("train/loss", loss)
        return loss


@dataclass(frozen=True)
class Job:
    """Something to train.

    Attributes:
        steps: Of a fit.
        module: Makes the module for an optimizer.
        data: Makes what `Trainer.fit` takes beside it, for so many steps.
    """

    title: str
    steps: int
    module: Callable[[OptimizerSpec], Replaceable]
    data: Callable[[int], dict[str, Any]]


def _batches(size: int, steps: int) -> dict[str, Any]:
    chosen = list(PythonSources(size).batches(torch.Generator().manual_seed(0), steps))
    return {"train_dataloaders": DataLoader(chosen, batch_size=None)}  # type: ignore[arg-type]


JOBS = {
    "digits": Job("digits, 10,026 parameters", 100, Digits, lambda steps: {"datamodule": DigitsData()}),
    "language": Job("language model, 10.2 M parameters", 10, Language, functools.partial(_batches, 2_000_000)),
    "tiny": Job(
        "a small language model", 8, functools.partial(Language, width=32), functools.partial(_batches, 50_000)
    ),
}


# ---------------------------------------------------------------------------------------------- clocks


class Clock(Callback):
    """When batches begin, and how long the optimizer's own part of each step is.

    The closure with forward and backward pass runs inside of `step`, and the last that it does is this hook.
    """

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.updates: list[float] = []
        self._begun = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._stop)

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches.append(time.perf_counter())

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.updates.append(time.perf_counter() - self._begun)


class HookTimes(Profiler):
    """Seconds in the hooks of some callbacks, with the time at which each ended."""

    def __init__(self, owners: Iterable[str]) -> None:
        super().__init__()
        self.owners = tuple(f"[Callback]{owner}" for owner in owners)
        self.found: list[tuple[float, float]] = []
        self._begun: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        if action_name.startswith(self.owners):
            self._begun[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name in self._begun:
            now = time.perf_counter()
            self.found.append((now, now - self._begun.pop(action_name)))

    def summary(self) -> str:
        return ""


def fit(job: Job, setting: Setting, steps: int) -> Record:
    """Milliseconds of one short fit: a whole step and an optimizer's step in the median, hooks in the mean."""
    seed_everything(0, verbose=False)
    module = job.module(setting.optimizer or "adamw")
    module.by_torch = setting.optimizer is None
    extra = [make() for make in setting.callbacks]
    clock, hooks = Clock(), HookTimes(type(callback).__qualname__ for callback in extra)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*extra, clock],
            profiler=hooks if extra else None,
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, **job.data(steps))
    counted = clock.batches[SKIPPED:]
    inside = [seconds for end, seconds in hooks.found if counted[0] <= end <= counted[-1]]
    return {
        "step_ms": 1e3 * statistics.median(b - a for a, b in itertools.pairwise(counted)),
        "update_ms": 1e3 * statistics.median(clock.updates[SKIPPED:]),
        "hooks_ms": 1e3 * sum(inside) / (len(counted) - 1),
        "parameters": sum(p.numel() for p in module.parameters()),
        "tensors": len(list(module.parameters())),
    }


def bookkeeping(tensors: int, rounds: int) -> Record:
    """A step of ours and of torch's on so many tensors of one element."""
    entry = next(iter(ours("adamw", "auto")))
    return measure([(1,)] * tensors, base().make, entry.contender.make, rounds, longest=30)


# ---------------------------------------------------------------------------------------------- what comes of it


def page(found: Record) -> str:
    """A table for each job: times, and what is added in percent of a step with torch's optimizer."""
    parts = [describe(found["about"])]
    for name, job in JOBS.items():
        rows = list(_rows([one for one in found["fits"] if one["job"] == name]))
        if not rows:
            continue
        head = [
            "",
            "step, ms",
            "optimizer's step, ms",
            "hooks, ms",
            "added, % of a step",
            "whole step relative to torch",
        ]
        parts.append(f"### {job.title}\n\n{_said(name, found)}\n\n{table(head, rows)}")
        failed = {one["setting"]: one["failed"] for one in found["fits"] if one["job"] == name and "failed" in one}
        parts += [f"{setting} was not measured: {reason}" for setting, reason in failed.items()]
    return "\n\n".join(parts)


def _rows(fits: Sequence[Record]) -> Iterator[list[str]]:
    of: dict[str, list[Record]] = {}
    for one in fits:
        if "step_ms" in one:
            of.setdefault(one["setting"], []).append(one)
    if TORCH not in of:
        return

    def middle(label: str, what: str) -> float:
        return float(statistics.median(one[what] for one in of[label]))

    whole, update = middle(TORCH, "step_ms"), middle(TORCH, "update_ms")
    for label in of:
        added = middle(label, "update_ms") - update + middle(label, "hooks_ms")
        yield [
            label,
            f"{middle(label, 'step_ms'):.2f}",
            f"{middle(label, 'update_ms'):.3f}",
            f"{middle(label, 'hooks_ms'):.3f}",
            "" if label == TORCH else f"{100 * added / whole:+.2f}",
            "" if label == TORCH else f"{100 * (middle(label, 'step_ms') / whole - 1):+.1f} %",
        ]


def _said(name: str, found: Record) -> str:
    fits = [one for one in found["fits"] if one["job"] == name and "step_ms" in one]
    rounds, codes = len({one["round"] for one in fits}), ", ".join(sorted({one["code"] for one in fits}))
    text = f"{rounds} rounds of fits with {fits[0]['steps']} steps. Commit: {codes}."
    both = found.get("bookkeeping", {}).get(name)
    if both is not None:
        text += (
            f" With {fits[0]['tensors']} tensors of one element, a step takes {1e3 * both['ms']:.0f} µs, "
            f"torch's {1e3 * both['base']['ms']:.0f} µs."
        )
    return text


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=["digits", "language"], choices=JOBS)
    parser.add_argument("--callbacks", nargs="*", default=callbacks.__all__, choices=callbacks.__all__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps of a fit")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new fit starts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "trainer_overhead.json")
    parser.add_argument("--page", action="store_true", help="write the tables to docs/speed.md")
    given = parser.parse_args(args)
    end = time.monotonic() + given.budget
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", module="lightning")  # its advice on loggers, workers and loaders
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = load(given.out, machine())
    fits = found.setdefault("fits", [])
    done = {(one["job"], one["round"], one["setting"]) for one in fits}
    for name, turn, setting in itertools.product(given.jobs, range(given.rounds), settings(given.callbacks)):
        if (name, turn, setting.label) in done:
            continue
        if time.monotonic() > end:
            print(
                f"the budget is spent before round {turn} of {name}, {setting.label}; the same command continues there"
            )
            break
        steps = max(SKIPPED + 3, round(given.scale * JOBS[name].steps))
        facts = {"job": name, "round": turn, "setting": setting.label, "steps": steps, "code": commit()}
        try:
            fits.append({**facts, **fit(JOBS[name], setting, steps)})
        except Exception as error:  # one callback that does not go with a job must not end the others' measurement
            fits.append({**facts, "failed": f"{type(error).__name__}: {str(error)[:300]}"})
        gc.collect()
        save(given.out, found)
        print({key: value for key, value in fits[-1].items() if key not in ("code", "steps")}, flush=True)
    for name in given.jobs:
        sizes = [one["tensors"] for one in fits if one["job"] == name and "tensors" in one]
        if sizes and name not in found.setdefault("bookkeeping", {}) and time.monotonic() < end:
            found["bookkeeping"][name] = bookkeeping(sizes[0], given.rounds)
            save(given.out, found)
    print(page(found))
    if given.page:
        write_part("speed.md", "trainer", page(found))


if __name__ == "__main__":
    main()
