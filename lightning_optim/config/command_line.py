"""How LightningCLI reads an optimizer: a word, a mapping, or a change of what it has read before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import yaml

from lightning_optim.config.changes import changed, changed_at
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.errors import OptionError, shown


def register() -> None:
    """Let jsonargparse read a spec wherever a signature has the type OptimizerStrategy."""
    try:
        from jsonargparse.typing import register_type
    except ImportError:  # it is only needed for config files
        return
    register_type(
        OptimizerStrategy,
        serializer=lambda spec: OptimizerStrategy.parse(
            spec
        ).as_config(),  # a linked argument is still a word or a dict
        deserializer=read,
        deserializer_exceptions=(OptionError,),
        type_check=lambda value, hint: isinstance(value, hint),
    )


def read(value: Any) -> OptimizerStrategy:
    """The strategy of an argument: of a whole spec, or of a change of the spec before.

    `--model.optimizer.lr 1e-3` and a mapping without a name are changes; `--model.optimizer.no_decay+ head.*`
    appends.

    Raises:
        OptionError: for an invalid spec, and for a change without a spec before.
    """
    path: list[str] = []
    if hasattr(value, "key") and hasattr(value, "val"):  # jsonargparse's NestedArg
        path, value = str(value.key).removeprefix("init_args.").split("."), read_value(value.val)
        path = ["name"] if path == ["class_path"] else path
    elif not isinstance(value, Mapping) or "name" in value or "class_path" in value:
        return OptimizerStrategy.parse(value)
    previous = _previous()
    if previous is None:
        given = f"{'.'.join(path)}={shown(value)}" if path else shown(value)
        raise OptionError(
            f"optimizer: {given} has no 'name', and no optimizer is given before that it could change. Write a "
            "word, such as adan, or a mapping with name and options, such as {name: adan, lr: 0.002}."
        )
    return OptimizerStrategy.parse(changed_at(previous, path, value) if path else changed(previous, value))


def read_value(text: Any) -> Any:
    """A value as the command line has it, in YAML. `1e-3` is a number, which it is not in YAML 1.1.

    jsonargparse hands on the `null` of an argument inside of another as "None".

    Example:
        >>> read_value("1e-3"), read_value("[0.9, 99e-2]"), read_value("auto"), read_value("None")
        (0.001, [0.9, 0.99], 'auto', None)
    """
    try:
        value = yaml.safe_load(text) if isinstance(text, str) else text
    except yaml.YAMLError:
        return text
    if value == "None":
        return None
    if isinstance(value, list):
        return [read_value(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _previous() -> Any:
    """What the parser has read for the same argument before, or its default.

    jsonargparse has it at hand where it calls a deserializer, and merges values of its own types with it, but it does
    not pass it on.
    """
    frame = inspect.currentframe()
    found: Any = None
    while frame is not None and not hasattr(frame.f_locals.get("self"), "_typehint"):
        if frame.f_code.co_name == "adapt_typehints" and found is None:
            found = frame.f_locals.get("prev_val")
        frame = frame.f_back
    default = frame.f_locals["self"].default if frame is not None else None
    return next((spec for spec in (found, default) if isinstance(spec, str | Mapping | OptimizerStrategy)), None)
