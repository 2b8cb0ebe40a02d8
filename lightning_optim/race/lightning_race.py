"""A race between optimizers on a LightningModule."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.race.candidates import base_rate, read_candidates
from lightning_optim.race.comparison import Comparison, notes_of
from lightning_optim.race.files import save
from lightning_optim.race.metric import choose
from lightning_optim.race.progress import Progress
from lightning_optim.race.race import Race
from lightning_optim.race.terms import Terms
from lightning_optim.race.training import LightningRun, Source


def race(
    source: Source,
    candidates: Sequence[Any],
    terms: Terms,
    *,
    config: OptimizerStrategy | None = None,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Fit a module with each candidate, learning rate and seed. Everything is checked before the first fit.

    Args:
        source: Where the module, the data and the Trainer come from.
        candidates: Specs of optimizers.
        terms: Seeds, learning rates, length and metric.
        config: The optimizer of the user's config.
        folder: Where runs are kept and files are written; None keeps nothing.
        processes: Number of runs at a time.
        progress: What is told while it runs.
        settings: What else decides the numbers of a run; a folder with other settings is refused.
        about: Settings and more, for the page.
        notes: What else a reader should know.

    Raises:
        OptionError: for wrong arguments, a module that cannot be trained, and a folder that holds something else.
    """
    read = read_candidates(candidates, config, terms.lr)
    budget, seeds = terms.budget(), terms.seeds_of_runs()
    run, grids = LightningRun(source, budget), {"factors": terms.factors, "extend": terms.extend}
    metric = {"metric": terms.metric, "mode": terms.mode}
    decides = {**(settings or {}), **({"budget": budget} if budget else {})}
    where = {"folder": folder, "settings": decides, "processes": processes, "progress": progress}
    made = Race(run, read, seeds=seeds, **grids, **metric, **where)  # type: ignore[arg-type]
    found = run.check(read)
    choose(terms.metric, terms.mode, found.metrics, found.facts.get("validated", ()))
    standings = made.go()
    assert made.metric is not None
    factors = ", ".join(f"{factor:g}" for factor in made.factors)
    base = base_rate(config) if terms.lr is None else terms.lr
    told = {
        **(about or {}),
        "length": terms.length(max(outcome.steps for outcome in made.runs.values())),
        "seeds": ", ".join(map(str, seeds)),
        "learning rates": f"{factors} times that of the candidate for AdamW's {base:g}, and up to {terms.extend} more "
        "where the best lies at the edge",
        "processes": str(processes),
        **versions(),
    }
    comparison = Comparison(standings, made.metric, made.runs, told, [*notes, *notes_of(made.runs)])
    if folder is not None:
        save(comparison, folder)
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
