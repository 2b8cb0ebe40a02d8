"""The command `lightning-optim`: LightningCLI for any module, and the list of optimizers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from lightning_optim.errors import OptionError


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-optim fit | validate | test | predict ...`, or `lightning-optim optimizers [name] [option=value]`.

    Args:
        args: The command line, without the command's name; by default that of the process.

    Raises:
        SystemExit: with 2 for a wrong option, after one sentence on stderr.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["optimizers"]:
        from lightning_optim.config.catalog import show

        raise SystemExit(show(given[1:]))
    sys.path.insert(0, os.getcwd())  # a config may name classes of the current folder
    try:
        _trainer_cli(args)
    except ValueError as error:
        if (ours := _option_error(error)) is None:
            raise
        print(f"lightning-optim: {ours}", file=sys.stderr)
        raise SystemExit(2) from error


def _trainer_cli(args: Sequence[str] | None) -> None:
    import torch
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--test_after_fit", type=bool, default=False, help="Run the test loop after fit.")

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            printed = StringIO()
            try:
                with redirect_stderr(printed):
                    super().parse_arguments(parser, args)
            except SystemExit as end:
                if error := _option_error(end):  # without the usage message around it
                    raise error from None
                sys.stderr.write(printed.getvalue())
                raise
            sys.stderr.write(printed.getvalue())

        def after_fit(self) -> None:
            if self.config.fit.test_after_fit:
                self.trainer.test(self.model, datamodule=self.datamodule)

    CLI(args=None if args is None else list(args))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # Lightning does it for nccl; gloo would abort at exit


def _option_error(error: BaseException | None) -> OptionError | None:
    """The `OptionError` behind an error of the parser or of a class that it instantiated."""
    while error is not None and not isinstance(error, OptionError):
        error = error.__cause__ or error.__context__
    return error
