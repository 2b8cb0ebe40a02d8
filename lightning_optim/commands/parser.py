"""LightningCLI with help that knows this package, and with its errors as one sentence."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_optim import callbacks as callbacks  # so that the parser knows their short names
from lightning_optim.errors import OptionError, option_error

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


class ConfigCLI(LightningCLI):
    """LightningCLI for any module and data, with the option `test_after_fit`."""

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
            if error := option_error(end) or of_copy(printed.getvalue()):  # without the usage message around it
                raise error from None
            sys.stderr.write(without_usage(printed.getvalue()))
            raise
        sys.stderr.write(printed.getvalue())


def without_usage(message: str) -> str:
    """What the parser says of an error, without the list of all options before it.

    Example:
        >>> without_usage("usage: fit [-h]\\n  [--model MODEL]\\ntip: try --help\\nerror: no such option\\n")
        'tip: try --help\\nerror: no such option\\n'
    """
    start = re.search(r"^(tip|error): ", message, re.MULTILINE)
    return message[start.start() :] if message.startswith("usage: ") and start else message


def of_copy(message: str) -> OptionError | None:
    """The sentence for a module or data of `pytorch_lightning`, which the parser takes for something else."""
    found = re.search(
        r"does not correspond to a subclass of (\w+).*?Given value: \W*(?:class_path\W+)?([\w.]+)", message, re.S
    )
    base, path = found.groups() if found else ("", "")
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if not any(one.__module__.startswith("pytorch_lightning.") for one in getattr(cls, "__mro__", ())):
        return None
    return OptionError(
        f"{path} is a {base} of pytorch_lightning, and this command runs those of lightning.pytorch, which are other "
        f"classes. Write `from lightning.pytorch import {base}` there, or fit it by a Trainer of pytorch_lightning."
    )
