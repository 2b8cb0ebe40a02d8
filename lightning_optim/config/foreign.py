"""Optimizers of torch and of other libraries: what their constructors take, and what they say of values."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, cast

import torch
from torch import nn

from lightning_optim.config.foreign_files import check_files
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.errors import OptionError, first_line, is_number, nearest, shown
from lightning_optim.language.options import Option, plain

# Options that all our pages have, and that say how a page is stored and run.
OF_PAGES = ("state_bits", "state_format", "engine", "owners", "cautious", "cautious_decay")
REQUIRED = inspect.Parameter.empty


class ForeignClass:
    """An optimizer that is none of our pages, with the attributes that a spec asks of a page.

    Its signature says which options there are. Whether a value is allowed only its constructor knows, so that is called
    for a sample parameter before training begins.

    Attributes:
        cls: The class.
        options: The options of its constructor by name; the default of a required one is `REQUIRED`.
        is_open: Whether it takes other options too, by `**kwargs`.
    """

    matrix_options: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    lengths: ClassVar[tuple[str, ...]] = ()
    own_average: ClassVar[bool] = False

    def __init__(self, cls: type[torch.optim.Optimizer]) -> None:
        self.cls = cls
        self.options, self.is_open = _options(cls)
        self._tried: dict[str, Any] = {}
        self._no_step: set[str] = set()

    def has_matrices(self) -> bool:
        return False

    def evaluates(self) -> bool:
        return False

    def read_options(self, given: Mapping[str, Any], owner: str, also: Sequence[str] = ()) -> dict[str, Any]:
        """Check the names of options, and what can be said of values without the class.

        Args:
            given: Values by name.
            owner: The optimizer or the group, for the message.
            also: Names of other keys, for the message.

        Raises:
            OptionError: for a name that the constructor does not have, and for a word where it has a number.
        """
        for name in given:
            if name in OF_PAGES and name not in self.options:
                raise OptionError(
                    f"{owner} has no option {name!r}, which is of our own optimizers: {self.cls.__name__} keeps its "
                    "state and steps in its own way. `lightning-optim optimizers` lists ours."
                )
            if name not in self.options and not self.is_open:
                known = [*self.options, *also]
                hint = nearest(name, known)
                raise OptionError(f"{owner} has no option {name!r}.{hint} Its options are {', '.join(known)}.")
        return {name: self._read(name, value, owner) for name, value in given.items()}

    def _read(self, name: str, value: Any, owner: str) -> Any:
        default = self.options[name].default if name in self.options else REQUIRED
        value = plain(value)
        if name == "lr" and not isinstance(value, torch.Tensor) and not (value is None and default is None):
            if not is_number(value) or not math.isfinite(value):
                raise OptionError(f"{owner}: lr={shown(value)} must be a finite number.")
        elif (
            is_number(default)
            and isinstance(value, str | int | float)
            and not (is_number(value) or isinstance(value, bool))
        ):
            raise OptionError(f"{owner}: {name}={shown(value)} must be a number.")
        value = tuple(value) if isinstance(value, list) and not isinstance(default, list) else value
        if default and isinstance(default, tuple) and isinstance(value, tuple) and len(value) != len(default):
            raise OptionError(
                f"{owner}: {name}={shown(list(value))} must have {len(default)} values, as its default {default}."
            )
        return value

    def check_all(self, options: Mapping[str, Any], owner: str) -> None:
        """Check options together, by making an optimizer of a sample parameter.

        Raises:
            OptionError: for a required option that is missing, and with what the class says of a value. Nothing is said
                where the class cannot be made for a sample without these values either.
        """
        required = [name for name, option in self.options.items() if option.default is REQUIRED]
        if missing := [name for name in required if name not in options]:
            such = ", such as lr: 0.001" if "lr" in missing else ""
            raise OptionError(
                f"{owner} needs {' and '.join(missing)}, for which {self.cls.__name__} has no default. Write it beside "
                f"the name{such}."
            )
        error = self._error(options)
        if error is None:
            self._refuse_ignored(options, owner)
        least = {name: options[name] for name in required}
        if error is None or not options or (least != options and self._error(least) is not None):
            return
        wrong = [name for name in options if self._error({**least, name: options[name]}) is not None] or [*options]
        values = ", ".join(f"{name}={shown(options[name])}" for name in wrong)
        raise OptionError(f"{owner}: {self.cls.__name__} refuses {values}: {first_line(error)}") from error

    def _refuse_ignored(self, options: Mapping[str, Any], owner: str) -> None:
        """Refuse what `**kwargs` takes and nothing keeps: a mistyped option."""
        made = self._trial(options)
        for name in options:
            if name not in self.options and name not in made.defaults and not hasattr(made, name):
                known = sorted({*self.options, *made.defaults})
                raise OptionError(
                    f"{owner} has no option {name!r}.{nearest(name, known)} Its options are {', '.join(known)}."
                )

    def in_groups(self, options: Mapping[str, Any]) -> Collection[str]:
        """The options that a parameter group may have."""
        made = self._trial(options)
        return made.defaults if isinstance(made, torch.optim.Optimizer) else self.options

    def decays(self, options: Mapping[str, Any]) -> bool:
        """Whether it has a weight decay, which groups may set."""
        return "weight_decay" in self.options and "weight_decay" in self.in_groups(options)

    def refuse_roles(self, changed: Mapping[str, Any], options: Mapping[str, Any], owner: str) -> None:
        """Refuse roles and patterns that mean nothing for this class.

        Args:
            changed: The keys of a spec beside the options of the optimizer that are not at their defaults.
            options: The options.
            owner: The optimizer, for the message.

        Raises:
            OptionError: for `full_precision`, and for `no_decay` where there is no weight decay.
        """
        if "full_precision" in changed:
            raise OptionError(
                f"{owner} has no full_precision: {self.cls.__name__} keeps its state in its own way. `state_bits` and "
                "`full_precision` are of our own optimizers, which `lightning-optim optimizers` lists."
            )
        if "no_decay" in changed and not self.decays(options):
            raise OptionError(f"{owner} has no weight_decay, so no_decay would mean nothing. Leave it out.")

    def takes_groups(self, options: Mapping[str, Any]) -> Exception | None:
        """What the class says of a second parameter group; None if it takes it, or if this cannot be found out."""
        if isinstance(self._trial(options), Exception):
            return None
        found = self._trial(options, count=2)
        return found if isinstance(found, Exception) else None

    def create(self, params: Any, options: Mapping[str, Any], owner: str) -> torch.optim.Optimizer:
        """The optimizer of parameters or groups.

        Raises:
            OptionError: with what the class says where it refuses them.
        """
        make: Any = self.cls
        try:
            made: torch.optim.Optimizer = make(params, **options)
        except Exception as error:  # other libraries raise what they like
            raise OptionError(f"{owner}: {self.cls.__name__} refuses these parameters: {first_line(error)}") from error
        with suppress(AttributeError):  # one that wraps another has no hooks
            check_files(made, self.sample_state(options))
        return made

    def sample_state(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state of a sample parameter after a step; None if the class takes no such step."""
        made = self._trial(options)
        if isinstance(made, Exception):
            return None
        p = made.param_groups[0]["params"][0]
        if p.grad is None:
            p.grad = torch.ones_like(p)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    made.step(lambda: torch.ones((), dtype=torch.float32, device="cpu"))
                except Exception:  # a sparse gradient is wanted, or anything else
                    made.state.clear()
                    self._no_step.add(repr(options))
        return None if repr(options) in self._no_step else dict(made.state.get(p, {}))

    def _error(self, options: Mapping[str, Any]) -> Exception | None:
        found = self._trial(options)
        return found if isinstance(found, Exception) else None

    def _trial(self, options: Mapping[str, Any], count: int = 1) -> Any:
        """An optimizer of sample parameters, or the exception instead. A class is asked once for the same options."""
        key = f"{count} {options!r}"
        if key not in self._tried:
            make: Any = self.cls
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns again when the optimizer is made
                try:
                    self._tried[key] = make([{"params": [_sample()]} for _ in range(count)], **options)
                except Exception as error:  # other libraries raise what they like
                    self._tried[key] = error
        return self._tried[key]


# Who says which options there are: a page, or the signature of a class of another library.
Kind = type[Optimizer] | ForeignClass


def kind_of(cls: type[torch.optim.Optimizer]) -> Kind:
    """Who says which options a class has."""
    return cls if issubclass(cls, Optimizer) else _foreign(cast(Any, cls))


@functools.cache
def _foreign(cls: Any) -> ForeignClass:
    return ForeignClass(cls)


def _sample() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2, dtype=torch.float32, device="cpu"))


def _options(cls: type) -> tuple[dict[str, Option], bool]:
    """The options of a constructor and, behind `**kwargs`, of those of its parents; whether the last has that too.

    A parent may have arguments that the class gives it, so none of them is required. What a base class takes, such as
    the `defaults` of torch's, is no option.
    """
    found: dict[str, Option] = {}
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = [*inspect.signature(base.__init__).parameters.values()][1:]  # type: ignore[misc]
        named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        if base is torch.optim.Optimizer or "defaults" in [p.name for p in named[:2]]:
            break
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        inherited = bool(found)
        for p in (p for p in named[1:] if p.kind in by_name and p.name not in found):
            default = None if inherited and p.default is REQUIRED else p.default
            found[p.name] = Option(p.name, p.annotation, default)
        if len(named) == len(parameters):
            return found, False
    return found, True
