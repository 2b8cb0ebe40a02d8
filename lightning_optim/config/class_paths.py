"""Classes by their path, such as `torch.optim.SGD`, and the path of a class."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.errors import OptionError, first_line, nearest, shown

BASES = (torch.optim.Optimizer, Optimizer)


def is_class_path(word: str) -> bool:
    """Whether a word has the form of a class path.

    Example:
        >>> is_class_path("torch.optim.SGD"), is_class_path("adan"), is_class_path("0.9")
        (True, False, False)
    """
    parts = word.split(".")
    return len(parts) > 1 and all(part.isidentifier() or part == "<locals>" for part in parts)


def load(path: str) -> type[torch.optim.Optimizer]:
    """The optimizer of a class path, whose module is imported.

    Raises:
        OptionError: for a module that does not exist or cannot be imported, and for anything but an optimizer.

    Example:
        >>> load("torch.optim.SGD").__name__
        'SGD'
        >>> load("torch.optim.Sdg")
        Traceback (most recent call last):
        ...
        lightning_optim.errors.OptionError: optimizer 'torch.optim.Sdg': torch.optim has no 'Sdg'. Did you mean SGD...
    """
    parts = path.split(".")
    if "<locals>" in parts:
        raise OptionError(
            f"optimizer {path!r} is defined in a function, where no config and no checkpoint finds it. Define it at "
            "the top of a module, or give it a word by register_optimizer."
        )
    for length in range(len(parts) - 1, 0, -1):
        module = _imported(".".join(parts[:length]), path)
        if module is not None:
            return check_class(_inside(module, parts[:length], parts[length:], path), path)
    raise OptionError(
        f"optimizer {path!r}: there is no module {parts[0]!r} here. Install the package that has it, or start where "
        "Python finds it."
    )


def check_class(found: Any, path: str) -> type[torch.optim.Optimizer]:
    """Refuse what is no optimizer that can be made.

    Raises:
        OptionError: for anything but a subclass of `torch.optim.Optimizer`.
    """
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found not in BASES:
        return found
    known: list[str] = []
    if found in BASES:
        what = "the base class of optimizers"
    elif isinstance(found, type):
        what = "a class, but no optimizer"
    elif isinstance(found, type(sys)):
        what = "a module"
        known = [name for name, value in vars(found).items() if isinstance(value, type)]
    else:
        what = f"no class, but {shown(found)}"
    hint = nearest(path.rpartition(".")[2], known)
    raise OptionError(f"optimizer {path!r} is {what}. Name a subclass of torch.optim.Optimizer.{hint}")


def path_of(cls: type) -> str:
    """The shortest path by which a class can be imported; its module and name where it cannot.

    Example:
        >>> path_of(torch.optim.SGD)
        'torch.optim.SGD'
    """
    name, parts = cls.__qualname__, cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = sys.modules.get(".".join(parts[:length]))
        if vars(module).get(name) is cls:
            return ".".join([*parts[:length], name])
    return f"{cls.__module__}.{name}"


def can_be_imported(cls: type) -> bool:
    """Whether another process finds a class by its path: not one of a function or of a script."""
    return "<locals>" not in cls.__qualname__ and cls.__module__ != "__main__"


def _imported(name: str, path: str) -> Any:
    """A module, or None where there is none of this name."""
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            return None
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise OptionError(f"optimizer {path!r}: importing {name} failed: {kind}{first_line(error)}") from error


def _inside(module: Any, before: list[str], rest: list[str], path: str) -> Any:
    found = module
    for i, part in enumerate(rest):
        if not hasattr(found, part):
            owner = ".".join([*before, *rest[:i]])
            names = [name for name, value in vars(found).items() if isinstance(value, type)]
            raise OptionError(f"optimizer {path!r}: {owner} has no {part!r}.{nearest(part, names)}")
        found = getattr(found, part)
    return found
