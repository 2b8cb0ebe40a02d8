"""The command `lightning-optim`: which command runs, and errors as one sentence."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lightning_optim.errors import nearest, option_error

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
OTHERS = ("compare", "memory", "optimizers")  # each a module of `commands` with `run(args)`, the exit status
HELP = """usage: lightning-optim COMMAND [OPTIONS]

Train with any LightningModule and data, by LightningCLI:
  fit         train
  validate    run the validation loop
  test        run the test loop
  predict     run the predict loop
Each reads --config FILE. With --help it shows its options, and with
--model.help CLASS those of a module.

Before you train:
  memory      will it fit? parameters, gradients, optimizer state and buffers on
              each rank, for several optimizers at 32, 16 and 8 bits

Choose:
  compare     race optimizers on your module and data: a table and a page

Look up:
  optimizers  the names that `optimizer:` takes: state, formula, options, advice

  --help      show this
  --version   show the version

Examples:
  lightning-optim memory --config digits.yaml --devices 8 --fits 24GB
  lightning-optim optimizers adan
  lightning-optim fit --config digits.yaml --model.optimizer.lr 1e-4
  lightning-optim compare --config digits.yaml adamw adan lion --seeds 5
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-optim COMMAND ...`.

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
    commands = (*TRAINER_COMMANDS, *OTHERS)
    if not given[0].startswith("-") and given[0] not in commands:
        print(
            f"lightning-optim: there is no command {given[0]!r}.{nearest(given[0], commands)} Commands are "
            f"{', '.join(commands)}; --help says more.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    sys.path.insert(0, os.getcwd())  # a config may name classes of the current folder
    try:
        if given[0] in OTHERS:
            raise SystemExit(_look_up(given[0], given[1:]))
        from lightning_optim.commands import trainer

        trainer.run(args)
    except ValueError as error:
        if (ours := option_error(error)) is None:
            raise
        print(f"lightning-optim: {ours}", file=sys.stderr)
        raise SystemExit(2) from error


def _look_up(command: str, args: Sequence[str]) -> int:
    """The exit status of a command that prints what it finds."""
    try:
        status: int = importlib.import_module(f"lightning_optim.commands.{command}").run(args)
        print(end="", flush=True)  # also where stdout is closed, and None
    except BrokenPipeError:  # `| head` has read enough; Python would complain when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
