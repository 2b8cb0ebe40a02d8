"""`lightning-optim fit | validate | test | predict`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_optim.commands.parser import ConfigCLI


class TrainerCLI(ConfigCLI):
    """Runs a loop of the Trainer, and the test loop after fit if asked to."""

    def after_fit(self) -> None:
        if self.config.fit.test_after_fit:
            self.trainer.test(self.model, datamodule=self.datamodule)


def run(args: Sequence[str] | None) -> None:
    """Run the loop that the first argument names.

    Args:
        args: The command line, without the command's name; by default that of the process.

    Raises:
        OptionError: for a wrong option of ours, before anything runs.
    """
    TrainerCLI(args=None if args is None else list(args), parser_kwargs={"prog": "lightning-optim"})
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # Lightning does it for nccl; gloo would abort at exit
