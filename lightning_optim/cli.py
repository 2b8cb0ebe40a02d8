"""The command `lightning-optim`: LightningCLI for any module, and the list of optimizers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from typing import Any

from lightning_optim.errors import OptionError, nearest

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
HELP = """usage: lightning-optim COMMAND [OPTIONS]

Train with any LightningModule and data, by LightningCLI:
  fit         train
  validate    run the validation loop
  test        run the test loop
  predict     run the predict loop
Each reads --config FILE. With --help it shows its options, and with
--model.help CLASS those of a module.

Look up:
  optimizers  the names that `optimizer:` takes: state, formula, options, advice

  --help      show this
  --version   show the version

Examples:
  lightning-optim optimizers adan
  lightning-optim fit --config digits.yaml --model.optimizer.lr 1e-4
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-optim fit | validate | test | predict ...`, or `lightning-optim optimizers [name] [option=value]`.

    Args:
        args: The command line, without the command's name; by default that of the process.

    Raises:
        SystemExit: with 0 after help, with 2 for a wrong command or option, after one sentence on stderr.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if given else sys.stderr)
        raise SystemExit(0 if given else 2)
    if given[0] == "--version":
        print(f"lightning-optim {version('lightning-optim')}")
        raise SystemExit(0)
    if given[0] == "optimizers":
        raise SystemExit(_optimizers(given[1:]))
    commands = (*TRAINER_COMMANDS, "optimizers")
    if not given[0].startswith("-") and given[0] not in commands:
        print(
            f"lightning-optim: there is no command {given[0]!r}.{nearest(given[0], commands)} Commands are "
            f"{', '.join(commands)}; --help says more.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    sys.path.insert(0, os.getcwd())  # a config may name classes of the current folder
    try:
        _trainer_cli(args)
    except ValueError as error:
        if (ours := _option_error(error)) is None:
            raise
        print(f"lightning-optim: {ours}", file=sys.stderr)
        raise SystemExit(2) from error


def _optimizers(args: Sequence[str]) -> int:
    from lightning_optim.config.catalog import show

    try:
        status = show(args)
        print(end="", flush=True)  # also where stdout is closed, and None
    except BrokenPipeError:  # `| head` has read enough; Python would complain when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _trainer_cli(args: Sequence[str] | None) -> None:
    import torch
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--test_after_fit", type=bool, default=False, help="Run the test loop after fit.")
            parser.add_optimizer_args()  # as LightningCLI does after this method
            for action in parser._actions:
                action.help = HELP_OF.get(action.dest, action.help)

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

    CLI(args=None if args is None else list(args), parser_kwargs={"prog": "lightning-optim"})
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # Lightning does it for nccl; gloo would abort at exit


HELP_OF = {
    "model": "The class of the LightningModule; --model.help CLASS shows its arguments, which follow as --model.NAME. "
    "A ConfiguredOptimizer takes --model.optimizer adan, or a mapping such as {name: adan, lr: 0.002}, and "
    "--model.optimizer.lr 1e-3 to change one option; `lightning-optim optimizers` lists names and options.",
    "data": "The class of the LightningDataModule; --data.help CLASS shows its arguments.",
    "optimizer": "The class of an optimizer, such as lightning_optim.Adan, for a module that configures none. A "
    "ConfiguredOptimizer takes --model.optimizer adan instead.",
    "lr_scheduler": "The class of a scheduler, for a module that configures none. A ConfiguredOptimizer takes "
    "--model.optimizer.schedule cosine instead.",
}


def _option_error(error: BaseException | None) -> OptionError | None:
    """The `OptionError` behind an error of the parser or of a class that it instantiated."""
    while error is not None and not isinstance(error, OptionError):
        error = error.__cause__ or error.__context__
    return error
