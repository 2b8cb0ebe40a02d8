"""What a user's config says, read and not run: the module, the data, the Trainer and the optimizer."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Sequence
from pydoc import locate
from typing import Any, cast

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from lightning_optim.commands.parser import ConfigCLI, of_copy
from lightning_optim.config.attach import attach
from lightning_optim.config.mixin import ConfiguredOptimizer
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.errors import OptionError, first_line, option_error


class ProjectCLI(ConfigCLI):
    """The options of `fit`, of which nothing is instantiated."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(
            Trainer, "fit", skip={"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        )

    def _set_seed(self) -> None:
        """The caller seeds, before what it builds."""

    def instantiate_classes(self) -> None:
        """Nothing yet."""


class Project:
    """What a user's config says. Nothing of it is built before it is asked for, and as often as it is asked for.

    Args:
        args: What `lightning-optim fit` takes: `--config FILE`, `--model CLASS`, `--model.width 8`, ...

    Attributes:
        options: All options, with defaults.
        spec: The optimizer of a `ConfiguredOptimizer`; None where the module configures its own.
        seed: That of `seed_everything`; None if there is none.

    Raises:
        OptionError: for a wrong option, a file or a class that does not exist, and a config without a model.
    """

    def __init__(self, args: Sequence[str]) -> None:
        parser_kwargs = {"prog": "lightning-optim", "exit_on_error": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            try:
                self._cli = ProjectCLI(args=list(args), parser_kwargs=parser_kwargs, run=False)
            except ArgumentError as error:
                message = str(error)
                raise option_error(error) or of_copy(message) or OptionError(_sentence(message)) from error
        self.options: Namespace = self._cli.config
        self.spec: OptimizerStrategy | None = self._read_spec()
        seed = self.options.seed_everything
        self.seed: int | None = None if isinstance(seed, bool) else seed

    @property
    def model_class(self) -> str:
        """The class path of the module."""
        return str(self.options.model.class_path)

    def module(self, optimizer: OptimizerStrategy | None = None, device: str | torch.device = "cpu") -> LightningModule:
        """Build the module, with another optimizer on demand.

        Args:
            optimizer: Replaces what the module configures, whether it is a `ConfiguredOptimizer` or not.
            device: Where its parameters are; on "meta" they take no memory.
        """
        options = self.options.clone()
        if optimizer is not None and isinstance(self._model_options().get("optimizer"), OptimizerStrategy):
            options.model.init_args.optimizer = optimizer
        if self.seed is not None:
            seed_everything(self.seed, workers=True, verbose=False)
        with torch.device(device):
            built = self._instantiate(options, "model", "optimizer", "lr_scheduler")
        module: LightningModule = built.model
        if optimizer is not None:
            attach(module, optimizer)
        elif self.options.get("optimizer") is not None:  # as LightningCLI does
            self._cli.model, self._cli.config_init = module, built
            self._cli._add_configure_optimizers_method_to_model(None)
        return module

    def data(self) -> LightningDataModule | None:
        """Build the data module; None where the config has none."""
        found: LightningDataModule | None = self._instantiate(self.options, "data").get("data")
        return found

    def trainer(self, **changes: Any) -> Trainer:
        """Build the Trainer, with its callbacks and loggers.

        Args:
            changes: Arguments of the Trainer that replace those of the config, which are then not built.
        """
        return Trainer(**self.trainer_options(**changes))

    def trainer_options(self, **changes: Any) -> dict[str, Any]:
        """The arguments of the Trainer, with objects where the config has classes, and with changes."""
        options = self.options.clone()
        for name in changes:
            options.trainer.pop(name, None)
        built: dict[str, Any] = self._instantiate(options, "trainer").trainer.as_dict()
        return {**built, **changes}

    def _instantiate(self, options: Namespace, *keys: str) -> Namespace:
        """Build parts. What a module's constructor raises comes as it is, and for others a sentence."""
        part = Namespace({key: options[key] for key in keys if options.get(key) is not None})  # type: ignore[no-untyped-call]
        try:
            built: Any = self._cli.parser.instantiate(part)
        except Exception as error:  # a user's constructor may raise anything
            found = _behind(error)
            if "model" not in keys:
                found = option_error(found) or OptionError(f"{keys[0]} of the config cannot be built: {_told(found)}")
        else:
            return cast(Namespace, built)
        raise found

    def _read_spec(self) -> OptimizerStrategy | None:
        given = self._model_options().get("optimizer")
        if given is None or isinstance(given, OptimizerStrategy):
            return given
        cls = locate(self.model_class)  # its argument may lack the annotation that lets the parser read it
        configured = isinstance(cls, type) and issubclass(cls, ConfiguredOptimizer)
        return OptimizerStrategy.parse(given) if configured else None

    def _model_options(self) -> Namespace:
        return self.options.model.get("init_args") or Namespace()  # type: ignore[no-untyped-call]


def _behind(error: Exception) -> Exception:
    """What a constructor raised. The parser tries several types, and speaks of all of them."""
    found: BaseException | None = error
    while found is not None and _of_parser(found):
        found = found.__cause__
    return found if isinstance(found, Exception) else error


def _of_parser(error: BaseException) -> bool:
    """Whether the parser itself has raised an error."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and bool(modules) and modules[-1].startswith("jsonargparse")


def _told(error: Exception) -> str:
    """An error in one line; of several that the parser lists, the one that is not on types."""
    lines = [line.strip(" -") for line in str(error).partition("Errors:")[2].splitlines()]
    told = [line for line in lines if line and not re.match("Expected a|Not a valid|Problem with", line)]
    return f"{told[0]}." if told else f"{type(error).__name__}: {first_line(error)}"


def _sentence(message: str) -> str:
    """An error of the parser in one line."""
    if re.search(r"required.*\bmodel\b", message, re.DOTALL):
        return (
            "there is no model. Give --config FILE with a `model:` (class_path and init_args), or --model CLASS, such "
            "as --model my_project.Classifier."
        )
    reasons = [line.strip(" -") for line in message.splitlines() if not re.search("NoneType|Expected a path", line)]
    key, problem = (
        reasons[0].partition(":")[0],
        next((i for i, line in enumerate(reasons) if re.match("Problem|Import", line)), None),
    )
    if problem is None:
        return " ".join(message.split())
    upto = next((i for i, line in enumerate(reasons) if line.startswith("Given value")), None)
    return " ".join([f"{key}:", *reasons[problem:upto]])
