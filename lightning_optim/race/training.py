"""One run of a race: a fit of a user's module with one optimizer, learning rate and seed."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_optim.config.mixin import ConfiguredOptimizer
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.errors import OptionError, first_line
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.candidates import spec_at
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.recorder import Diverged, Recorder, seed_all
from lightning_optim.training.lightning_names import is_a, overrides

REPLACED = (Checkpoint, ModelSummary, ProgressBar)
OF_ONE_BATCH = {
    "max_epochs": 1,
    "max_steps": -1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "accumulate_grad_batches": 1,
}


class Source(Protocol):
    """Where a module, its data and its Trainer come from. It is sent to other processes where there are several."""

    def module(self, optimizer: OptimizerStrategy, seed: int) -> LightningModule:
        """A new module with this optimizer."""
        ...

    def data(self) -> Any:
        """New data: a LightningDataModule, DataLoaders, or None where the module has its own."""

    def trainer_options(self, **changes: Any) -> dict[str, Any]:
        """Arguments of a Trainer, with new callbacks, and with changes."""
        ...


class LightningRun:
    """Fits a module; a `run` for `Race`.

    The callbacks of the source stay. Loggers, checkpoints, progress bars and the model's summary do not.

    Args:
        source: Module, data and Trainer.
        budget: `max_epochs` or `max_steps`, if they are not those of the source.
    """

    def __init__(self, source: Source, budget: Mapping[str, Any] | None = None) -> None:
        self.source, self.budget = source, dict(budget or {})
        self.progress: Callable[[float], None] | None = None

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        """Fit with one optimizer.

        Args:
            candidate: Whose `spec` is that of an optimizer.
            seed: Of weights, batches and all else.
            lr: The learning rate.
        """
        try:
            return self._fit(candidate, seed, lr, {})
        finally:  # a Trainer and its module refer to each other
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def check(self, candidates: list[Candidate]) -> Outcome:
        """Train one batch with the first candidate that can, to see that it works and which metrics there are.

        Raises:
            OptionError: for several ranks, a run without an end, and where no candidate can.
        """
        try:
            with _quietly():
                trainer = self._trainer({}, [])
        except OptionError:
            raise
        except Exception as error:  # Lightning raises several kinds
            raise OptionError(
                f"the Trainer of the config cannot be made on this machine: {first_line(error)} Options of fit change "
                "it, such as --trainer.accelerator cpu."
            ) from error
        if trainer.world_size > 1:
            raise OptionError(
                f"the config trains on {trainer.world_size} devices with {type(trainer.strategy).__name__}, and a race "
                "runs each candidate on one. Add --trainer.devices 1 --trainer.num_nodes 1 --trainer.strategy auto."
            )
        options = {**self.source.trainer_options(logger=False, callbacks=None), **self.budget}
        ends = [options.get(name) not in (None, -1, False) for name in ("max_epochs", "max_steps", "max_time")]
        if not any(ends) and not options.get("fast_dev_run"):
            raise OptionError("the config does not say how long to train. Give --epochs or --steps.")
        failures: dict[str, str] = {}
        for candidate in candidates:
            try:
                found = self._fit(candidate, 0, candidate.lr, OF_ONE_BATCH)
            except Exception as error:
                failures[candidate.name] = Outcome.crash(error).reason
                continue
            if found.status == "finished":
                return found
            failures[candidate.name] = found.reason
        reasons = set(failures.values())
        told = reasons.pop() if len(reasons) == 1 else " ".join(f"{name}: {why}" for name, why in failures.items())
        raise OptionError(f"no candidate trains a batch. {told}")

    def _fit(self, candidate: Candidate, seed: int, lr: float, changes: Mapping[str, Any]) -> Outcome:
        strategy = OptimizerStrategy.parse(spec_at(candidate, lr))
        recorder = Recorder(seed, None if changes else self.progress)
        begun = time.perf_counter()
        with isolate_rng(), _quietly() as warned:
            seed_all(seed)
            module = self.source.module(strategy, seed)
            seed_all(seed)
            data = self.source.data()
            trainer = self._trainer(changes, [recorder])
            seed_all(seed)
            status, reason = "finished", ""
            try:
                _fit(trainer, module, data)
                if recorder.validated_at != recorder.steps and _validates(module, data):
                    _validate(trainer, module, data)
            except Diverged as error:
                status, reason = "diverged", first_line(error)
            except Exception as error:
                if module.automatic_optimization:
                    raise
                raise OptionError(
                    f"{type(module).__name__} optimizes by itself (automatic_optimization=False), and a race gives it "
                    f"one optimizer, whatever it configures: {type(error).__name__}: {first_line(error)}"
                ) from error
            recorder.finish(trainer)
        facts: dict[str, Any] = {"validated": recorder.validated, "start": recorder.start, "batches": recorder.batches}
        facts["replaced"] = type(module).__name__ if _configures(module) else ""
        facts["early"] = status == "finished" and recorder.steps < recorder.planned < float("inf")
        facts["warnings"] = sorted({" ".join(str(w.message).split()) for w in warned if not _of_others(w.filename)})
        return Outcome(
            "diverged" if status == "diverged" else "finished",
            reason,
            metrics=recorder.metrics,
            curves=recorder.curves,
            steps=recorder.steps,
            seconds=time.perf_counter() - begun,
            step_seconds=recorder.step_seconds,
            state_bytes=recorder.state_bytes,
            facts={key: value for key, value in facts.items() if value},
        )

    def _trainer(self, changes: Mapping[str, Any], callbacks: list[Any]) -> Trainer:
        ours = {
            "logger": DummyLogger(),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        options = self.source.trainer_options(**{**ours, **self.budget, **changes})
        given = options.get("callbacks") or []
        listed = list(given) if isinstance(given, list | tuple) else [given]
        options["callbacks"] = [*callbacks, *(one for one in listed if not isinstance(one, REPLACED))]
        return Trainer(**options)


def _fit(trainer: Trainer, module: LightningModule, data: Any) -> None:
    """Fit; Ctrl-C comes back as such, which Lightning turns into an exit with status 1."""
    import signal

    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, **_arguments(data, "train_dataloaders"))
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt) or trainer.interrupted:
            raise KeyboardInterrupt from None
        raise RuntimeError(f"it asked to exit with status {end.code}") from end
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
    if trainer.interrupted:
        raise KeyboardInterrupt


def _validate(trainer: Trainer, module: LightningModule, data: Any) -> None:
    """Validate at the end, where the last step was not followed by a validation."""
    trainer.validate(module, **_arguments(data, "dataloaders"), verbose=False)


def _arguments(data: Any, name: str) -> dict[str, Any]:
    """How `fit` or `validate` takes data: a data module, a loader, or a pair for training and for validation."""
    if data is None or is_a(data, LightningDataModule):
        return {"datamodule": data}
    train, validation = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if name == "dataloaders":
        return {name: validation}
    return {name: train, "val_dataloaders": validation}


def _configures(module: LightningModule) -> bool:
    """Whether a module has an optimizer of its own, which candidates replace."""
    own = type(module).configure_optimizers is not LightningModule.configure_optimizers
    return own and not isinstance(module, ConfiguredOptimizer)


def _validates(module: LightningModule, data: Any) -> bool:
    if not overrides(module, "validation_step", LightningModule):
        return False
    if is_a(data, LightningDataModule):
        return overrides(data, "val_dataloader", LightningDataModule)
    return overrides(module, "val_dataloader", LightningModule) if data is None else isinstance(data, tuple)


@contextlib.contextmanager
def _quietly() -> Iterator[list[warnings.WarningMessage]]:
    """Nothing is printed, and warnings are kept."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "pytorch.utilities", "fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield warned
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _of_others(filename: str) -> bool:
    """Whether a warning is of a library that is not ours, and would come with every run."""
    return any(
        f"/{name}/" in filename.replace("\\", "/") for name in ("lightning", "torch", "torchmetrics", "contextlib")
    )
