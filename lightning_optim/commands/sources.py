"""Where the module, the data and the Trainer of a race come from: a user's config, or Python."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule

from lightning_optim.commands.project import Project
from lightning_optim.config.attach import attach
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.errors import OptionError, shown
from lightning_optim.training.lightning_names import base_of, is_a

# Options of the Trainer that decide no number of a run, or are the race's own.
OTHERS = (
    "logger",
    "enable_progress_bar",
    "enable_model_summary",
    "enable_checkpointing",
    "default_root_dir",
    "profiler",
    "log_every_n_steps",
)


class ConfigSource:
    """What a config says.

    Args:
        args: As `lightning-optim fit` takes them.

    Raises:
        OptionError: for a wrong option, and for a config that resumes a run.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self._args = list(args)
        self.project = Project(self._args)
        if self.project.options.get("ckpt_path"):
            raise OptionError("ckpt_path resumes a run of one optimizer, and a race begins all from the first weights.")

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigSource, (self._args,)  # a parser cannot be sent to another process

    @property
    def spec(self) -> OptimizerStrategy | None:
        """The optimizer of the config: of a `ConfiguredOptimizer`, or a class beside the module; None if neither.

        Raises:
            OptionError: for a class that takes other options.
        """
        beside = self.project.options.get("optimizer")
        if self.project.spec is not None or beside is None:
            return self.project.spec
        return OptimizerStrategy.parse({"name": beside.class_path, **(beside.get("init_args") or {})})

    def module(self, optimizer: OptimizerStrategy, seed: int) -> LightningModule:
        self.project.seed = seed
        return self.project.module(optimizer)

    def data(self) -> Any:
        return self.project.data()

    def trainer_options(self, **changes: Any) -> dict[str, Any]:
        return self.project.trainer_options(**changes)

    def settings(self, budget: bool) -> dict[str, Any]:
        """What decides the numbers of a run.

        Args:
            budget: Whether the race has a length of its own.
        """
        options = self.project.options.as_dict()
        found = {key: copy.copy(options.get(key)) for key in ("model", "data", "trainer")}
        if isinstance(found["model"], dict) and self.project.spec is not None:
            given = {**found["model"].get("init_args", {})}
            given.pop("optimizer", None)
            found["model"] = {**found["model"], "init_args": given}
        without = (*OTHERS, *(("max_epochs", "max_steps") if budget else ()))
        found["trainer"] = {key: value for key, value in (found["trainer"] or {}).items() if key not in without}
        return found


class PythonSource:
    """What Python says.

    Args:
        module: A class or function that makes a LightningModule; it gets `optimizer` if it takes that.
        data: A class or function that makes data, or data, which is copied for each run.
        trainer: Arguments of the Trainer; callbacks are copied for each run.
    """

    def __init__(self, module: Callable[..., Any], data: Any = None, trainer: Mapping[str, Any] | None = None) -> None:
        if not callable(module) or is_a(module, LightningModule):
            raise OptionError(
                f"module={shown(module)} must be a class or a function that makes a new LightningModule for each run, "
                "such as lambda: Classifier(width=32)."
            )
        if trainer is not None and not isinstance(trainer, Mapping):
            raise OptionError(f"trainer={shown(trainer)} must be a mapping of the Trainer's arguments, or None.")
        self._module, self._data, self._trainer = module, data, dict(trainer or {})
        self._takes = "optimizer" in inspect.signature(module).parameters

    def module(self, optimizer: OptimizerStrategy, seed: int) -> LightningModule:
        module: LightningModule = self._module(optimizer=optimizer) if self._takes else self._module()
        if base_of(type(module), LightningModule) is not LightningModule:
            raise OptionError(f"module made a {type(module).__name__}, and not a LightningModule of lightning.pytorch.")
        attach(module, optimizer)
        return module

    def data(self) -> Any:
        made = isinstance(self._data, type) or inspect.isroutine(self._data)
        return self._data() if made else copy.deepcopy(self._data)

    def trainer_options(self, **changes: Any) -> dict[str, Any]:
        kept = {key: value for key, value in self._trainer.items() if key not in changes}
        return {**copy.deepcopy(kept), **changes}

    def settings(self, budget: bool) -> dict[str, Any]:
        """What decides the numbers of a run, as far as it can be named.

        Args:
            budget: Whether the race has a length of its own.
        """
        without = (*OTHERS, *(("max_epochs", "max_steps") if budget else ()))
        trainer = {key: _name(value) for key, value in self._trainer.items() if key not in without}
        return {"model": _name(self._module), "data": _name(self._data), "trainer": trainer}


def _name(value: Any) -> Any:
    """A value that JSON has a form for, or the name of its class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_name(item) for item in value]
    named = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    return f"{named.__module__}.{named.__qualname__}"
