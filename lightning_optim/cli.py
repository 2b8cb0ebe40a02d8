"""The command `lightning-optim`: LightningCLI for any module, and what there is to choose from."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """`lightning-optim fit | validate | test | predict ...`, or `lightning-optim optimizers [name]`."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["optimizers"]:
        from lightning_optim.catalog import show

        raise SystemExit(show(given[1:]))
    sys.path.insert(0, os.getcwd())  # so that a config may name classes of the folder it is used in
    _trainer_cli(args)


def _trainer_cli(args: Sequence[str] | None) -> None:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--test_after_fit", type=bool, default=False, help="Run the test loop after fit.")

        def after_fit(self) -> None:
            if self.config.fit.test_after_fit:
                self.trainer.test(self.model, datamodule=self.datamodule)

    CLI(args=None if args is None else list(args))
