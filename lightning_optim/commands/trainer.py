"""`lightning-optim fit | validate | test | predict`."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from lightning_optim.commands.parser import ConfigCLI
from lightning_optim.errors import OptionError, first_line, shown
from lightning_optim.reports.ending import ending


class SavedConfig(SaveConfigCallback):
    """Writes the config that was read to the folder of the logs. Without a logger that would be the current folder."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class TrainerCLI(ConfigCLI):
    """Runs a loop of the Trainer, and the test loop after fit if asked to."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        refuse_unwritable(trainer)
        return trainer

    def before_fit(self) -> None:
        self._begun = time.monotonic()

    def after_fit(self) -> None:
        if self.config.fit.test_after_fit:
            self.trainer.test(self.model, datamodule=self.datamodule)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            configs = [str(path) for path in self.config.fit.config or []]
            print("\n".join(["", *ending(self.trainer, self.model, time.monotonic() - self._begun, configs)]))


def refuse_unwritable(trainer: Trainer) -> None:
    """Refuse folders of logs and checkpoints that cannot be written, before anything runs.

    Raises:
        OptionError: for such a folder.
    """
    loggers: list[Any] = trainer.loggers
    callbacks: list[Any] = trainer.checkpoint_callbacks
    folders = {str(getattr(logger, "save_dir", None) or ""): "save_dir of the logger" for logger in loggers}
    folders |= {str(getattr(callback, "dirpath", None) or ""): "dirpath of the callback" for callback in callbacks}
    for folder, option in folders.items():
        if not folder or "://" in folder:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            why = f"{type(error).__name__}: {error.strerror or first_line(error)}"
            raise OptionError(
                f"the folder {shown(folder)} cannot be written ({why}). Set {option} to another folder."
            ) from error


def run(args: Sequence[str] | None) -> None:
    """Run the loop that the first argument names.

    Args:
        args: The command line, without the command's name; by default that of the process.

    Raises:
        OptionError: for a wrong option of ours and for a folder that cannot be written or is taken, before anything
            runs.
    """
    with warnings.catch_warnings():
        # What Lightning calls that torch has deprecated since: nothing that a user could change.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
        try:
            given = None if args is None else list(args)
            TrainerCLI(args=given, save_config_callback=SavedConfig, parser_kwargs={"prog": "lightning-optim"})
        except RuntimeError as error:
            if not str(error).startswith(f"{SavedConfig.__name__} expected"):
                raise
            raise OptionError(
                f"the log folder is taken: {str(error).split()[2]} is there from another run. Leave `version` of the "
                "logger out, or give another one, or delete the folder."
            ) from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # Lightning does it for nccl; gloo would abort at exit


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning is about the run, and not about another product."""
    return "litlogger" not in record.getMessage()
