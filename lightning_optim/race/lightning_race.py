"""A race between optimizers on a LightningModule."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.errors import OptionError, is_whole, shown
from lightning_optim.race import grid
from lightning_optim.race.candidates import base_rate, read_candidates
from lightning_optim.race.comparison import Comparison, notes_of
from lightning_optim.race.files import save
from lightning_optim.race.metric import choose
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.progress import Progress
from lightning_optim.race.race import Race, check_seeds
from lightning_optim.race.training import LightningRun, Source


def race(
    source: Source,
    candidates: Sequence[Any],
    config: OptimizerStrategy | None = None,
    *,
    lr: float | None = None,
    factors: Sequence[float] = grid.FACTORS,
    seeds: int | Sequence[int] = 3,
    first_seed: int = 0,
    epochs: int | None = None,
    steps: int | None = None,
    metric: str | None = None,
    mode: str | None = None,
    extend: int = 2,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> Comparison:
    """Fit a module with each candidate, learning rate and seed. Everything is checked before the first fit.

    Args:
        source: Where the module, the data and the Trainer come from.
        candidates: Specs of optimizers.
        config: The optimizer of the user's config.
        lr: AdamW's learning rate, on which those of candidates are based.
        factors: The grid: factors on a candidate's learning rate.
        seeds: Their number, or the seeds.
        first_seed: The first of a number of seeds.
        epochs: Epochs of a run, instead of those of the source.
        steps: Steps of a run, instead of those of the source.
        metric: What decides; by default the validation loss if there is one, else the training loss.
        mode: "min" or "max"; by default by the name of the metric.
        extend: The most learning rates by which a grid may grow where the best lies at its edge.
        folder: Where runs are kept and files are written; None keeps nothing.
        processes: Number of runs at a time.
        progress: What is told while it runs.
        settings: What else decides the numbers of a run.
        about: What a reader should know of it.

    Raises:
        OptionError: for wrong arguments, a module that cannot be trained, and a folder that holds something else.
    """
    read = read_candidates(candidates, config, lr)
    listed = _seeds(seeds, first_seed)
    budget = _budget(epochs, steps)
    run = LightningRun(source, budget)
    made = Race(
        run,
        read,
        seeds=listed,
        factors=factors,
        metric=metric,
        mode=mode,
        extend=extend,
        processes=processes,
        progress=progress,
    )
    found = run.check(read)
    choose(metric, mode, found.metrics, found.facts.get("validated", ()))
    made.keep(folder, {**(settings or {}), **({"budget": budget} if budget else {})})
    standings = made.go()
    assert made.metric is not None
    base = base_rate(config) if lr is None else lr
    told = {
        **(about or {}),
        "length": _length(epochs, steps, made.runs.values()),
        "seeds": ", ".join(map(str, listed)),
        "learning rates": f"{', '.join(f'{factor:g}' for factor in made.factors)} times that of the candidate for "
        f"AdamW's {base:g}, and up to {extend} beyond the edge where the best lies",
        "processes": str(processes),
        **versions(),
    }
    comparison = Comparison(standings, made.metric, made.runs, told, notes_of(made.runs))
    if folder is not None:
        save(comparison, Path(folder))
    return comparison


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("lightning-optim", "torch", "lightning")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return {
        "versions": ", ".join([f"{name} {version(name)}" for name in names] + [f"Python {platform.python_version()}"]),
        "machine": ", ".join([platform.machine(), threads, *devices]),
    }


def _seeds(seeds: int | Sequence[int], first: int) -> list[int]:
    if isinstance(seeds, list | tuple | range):
        return check_seeds(seeds)
    if not is_whole(seeds):
        raise OptionError(f"seeds={shown(seeds)} must be a number of seeds, at least 1, or a list of seeds.")
    return check_seeds(range(first, first + int(seeds)))


def _length(epochs: int | None, steps: int | None, outcomes: Iterable[Outcome]) -> str:
    """How long a run is, in words."""
    taken = max((outcome.steps for outcome in outcomes), default=0)
    if epochs is not None:
        return f"{epochs} epoch{'s' if epochs > 1 else ''}, {taken} steps"
    return f"{steps} steps" if steps is not None else f"that of the config, {taken} steps"


def _budget(epochs: int | None, steps: int | None) -> dict[str, int]:
    if epochs is not None and steps is not None:
        raise OptionError(f"epochs={shown(epochs)} and steps={shown(steps)} are both given. Give one of them.")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and not is_whole(value):
            raise OptionError(f"{name}={shown(value)} must be a whole number, at least 1.")
    if epochs is not None:
        return {"max_epochs": epochs, "max_steps": -1}
    return {} if steps is None else {"max_steps": steps, "max_epochs": -1}
