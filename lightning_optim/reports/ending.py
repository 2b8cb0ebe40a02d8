"""What a fit has come to, in a few lines: the metrics, time and memory, where the log is, and what to type next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_optim.reports.memory import human, state_memory
from lightning_optim.reports.settings import settings
from lightning_optim.training.lightning_names import is_a

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def ending(trainer: Trainer, module: LightningModule, seconds: float, configs: Sequence[str] = ()) -> list[str]:
    """The lines, after a fit and the test that may follow it.

    Args:
        trainer: The Trainer.
        module: Its module.
        seconds: How long it took.
        configs: The files of the command line, for commands that take them too.
    """
    rows = {**_metrics(trainer), **_memory(trainer), **_places(trainer), **_commands(trainer, module, configs)}
    width = max(map(len, rows), default=0)
    return [f"{_title(trainer, module)} in {_duration(seconds)}.", *(f"  {k:{width}}  {v}" for k, v in rows.items())]


def _title(trainer: Trainer, module: LightningModule) -> str:
    set_to = settings(trainer, module)
    optimizer, schedule = set_to.get("optimizer", "no optimizer"), set_to.get("schedule", "constant")
    with_schedule = "" if schedule == "constant" else f" with schedule {schedule}"
    epochs, steps = trainer.current_epoch, trainer.global_step
    length = f"{steps} step{'' if steps == 1 else 's'}, {epochs} epoch{'' if epochs == 1 else 's'}"
    return f"{type(module).__name__} by {optimizer}{with_schedule}: {length}"


def _metrics(trainer: Trainer) -> dict[str, str]:
    """Those of the test or, without one, of the last validation and what else the progress bar shows."""
    everything: Mapping[str, Any] = trainer.callback_metrics
    tested = trainer.state.fn == "test"
    raw: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        raw |= getattr(callback, "raw_metrics", {})
    if not tested:
        everything = {**trainer.progress_bar_metrics, **{name: everything[name] for name in raw if name in everything}}
    found = {}
    for name, value in everything.items():
        found[name] = f"{float(value):.4g}"
        if name in raw:
            found[name] += f" with the average of the weights, {raw[name]:.4g} with the last weights"
    return found


def _memory(trainer: Trainer) -> dict[str, str]:
    params = {p for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    entries = [entry for optimizer in trainer.optimizers for entry in state_memory(optimizer)]
    parameters, state = sum(p.numel() * p.element_size() for p in params), sum(entry.bytes for entry in entries)
    return {"optimizer state": f"{human(state)} beside {human(parameters)} of parameters"} if params else {}


def _places(trainer: Trainer) -> dict[str, str]:
    """Where logs and checkpoints are, and the command that shows curves."""
    rows, loggers = {}, list(trainer.loggers)
    folders = [str(logger.log_dir) for logger in loggers if getattr(logger, "log_dir", None)]
    if folders:
        rows["log"] = ", ".join(map(_relative, folders))
    saved = [str(getattr(callback, "dirpath", None) or "") for callback in trainer.checkpoint_callbacks]
    if kept := list(dict.fromkeys(folder for folder in saved if folder and os.path.isdir(folder))):
        rows["checkpoints"] = ", ".join(map(_relative, kept))
    boards: list[Any] = [logger for logger in loggers if is_a(logger, TensorBoardLogger)]
    tables: list[Any] = [logger for logger in loggers if is_a(logger, CSVLogger)]
    if boards:
        rows["see curves"] = command("tensorboard", "--logdir", _relative(str(boards[0].save_dir)))
    elif tables:
        rows["see numbers"] = _relative(str(tables[0].experiment.metrics_file_path))
    return rows


def _commands(trainer: Trainer, module: LightningModule, configs: Sequence[str]) -> dict[str, str]:
    """What else there is to do with this config."""
    files = [part for config in configs for part in ("--config", _relative(config))]
    if not files or not trainer.optimizers:
        return {}
    word = settings(trainer, module)["optimizer"]
    other = next(name for name in ("adamw", "lion") if name != word)
    return {
        "race optimizers": command("lightning-optim", "compare", *files, word, other),
        "count its memory": command("lightning-optim", "memory", *files),
    }


def command(name: str, *args: str) -> str:
    """A command line to type. If the command is not on the PATH, the environment of this Python is activated first."""
    line = shlex.join([name, *args])
    activate = Path(sys.prefix, "bin", "activate")
    if shutil.which(name) or not activate.exists():
        return line
    return f"source {shlex.quote(_relative(str(activate)))} && {line}"


def _relative(path: str) -> str:
    """A path as one would type it: from the current folder, if it is inside of it."""
    if "://" in path:
        return path
    short = os.path.relpath(path)
    return path if short.startswith("..") else short


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
