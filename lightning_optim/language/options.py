"""The options of an optimizer: declared by annotated class attributes, and checked in the constructor.

    class Lion(Optimizer):
        lr: float = 1e-4
        betas: tuple[float, float] = (0.9, 0.99)

is the whole declaration. The constructor, its types, its help and its checks follow from it. An option has the same
range on every page (`RANGES`) unless a page overrides it in `ranges`.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

import torch
from typing_extensions import dataclass_transform

from lightning_optim.errors import OptionError, nearest, shown

T = TypeVar("T")

# An interval such as "[0, 1)" or ">= 0", for one value or for each item of a tuple.
Range = str | tuple[str, ...]

RANGES: dict[str, Range] = {
    "lr": ">= 0",
    "eps": ">= 0",
    "weight_decay": ">= 0",
    "betas": "[0, 1)",
    "beta": "[0, 1)",
    "beta1": "[0, 1)",
    "beta2_decay": "(-inf, 0]",
    "alpha": "[0, 1)",
    "momentum": "[0, 1)",
    "dampening": "[0, 1]",
    "max_grad_norm": ">= 0",
    "min_dim_size_to_factor": ">= 0",
    "r": "> 0",
    "R0": "> 0",
    "alpha_r": "[0, 1)",
    "loss_target": "any",
}

# Arguments of torch.optim and other libraries that have another name here or are not needed, with what to do instead.
ELSEWHERE = {
    "foreach": "engine='auto' already runs a whole group at once",
    "fused": "engine='auto' already runs the fastest engine that can serve",
    "differentiable": "steps are not differentiated through",
    "weight_decouple": "use decoupled",
    "decouple": "use decoupled",
    "clip_threshold": "use d",
    "decay_rate": "use beta2_decay",
    "learning_rate": "use lr",
    "ns_steps": "use steps",
    "ns_coefficients": "use coefficients",
    "adjust_lr_fn": "use adjust",
    "wd": "use weight_decay",
}


@dataclass(frozen=True)
class Option:
    """An option that a page declares."""

    name: str
    type: Any
    default: Any
    range: Range | None = None
    shared: bool = False  # declared on the base class: keyword only, the same for every optimizer

    def _allowed(self) -> str:
        """The range in words."""
        if self.range is None or self.range == "any":
            return "a finite number"
        return self.range if isinstance(self.range, str) else "(" + ", ".join(self.range) + ")"

    def converted(self, value: Any, owner: str) -> Any:
        """Convert a value to the declared type, in whatever range: schedules may overshoot zero by a rounding error.

        Raises:
            OptionError: for a value of another type, and for NaN and infinity.
        """
        try:
            found = _converted(value, self.type)
        except TypeError:
            allowed = describe(self.type)
            hint = _as_number(value) if allowed.startswith(("a number", "an integer")) else ""
            raise OptionError(f"{owner}: {self.name}={shown(value)} must be {allowed}.{hint}") from None
        endless = isinstance(self.range, str) and self.range.endswith("inf]")
        if not all(math.isfinite(number) or (endless and number == math.inf) for number in _numbers(found)):
            raise OptionError(f"{owner}: {self.name}={shown(value)} is out of range; allowed is {self._allowed()}.")
        return found

    def checked(self, value: Any, owner: str) -> Any:
        """Convert a value to the declared type (an int becomes a float).

        Args:
            value: The value.
            owner: The optimizer, for the message.

        Raises:
            OptionError: for a value of another type, or out of range.
        """
        value = self.converted(value, owner)
        if self.range is not None and not _inside(value, self.range):
            each = " for each item" if isinstance(value, tuple) and isinstance(self.range, str) else ""
            raise OptionError(
                f"{owner}: {self.name}={shown(value)} is out of range; allowed is {self._allowed()}{each}."
            )
        return value


def shared(*, default: T, kw_only: bool) -> T:
    """The default of an option of all optimizers. Type checkers read `kw_only` from the call."""
    return default


@dataclass_transform(field_specifiers=(shared,))
class Declared:
    """Tells type checkers that annotated class attributes of subclasses are the arguments of their constructors."""


def read_options(cls: type, base: type, without: Collection[str] = ()) -> dict[str, Option]:
    """The options of a page by name: those of its parents, its own, then those of all optimizers (`base`).

    Args:
        cls: The page.
        base: The class that declares the options of all optimizers.
        without: Options that the page does not have.
    """
    ranges: dict[str, Range] = dict(RANGES)
    declared: dict[str, bool] = {}
    for parent in reversed([c for c in cls.__mro__ if issubclass(c, base)]):
        ranges.update(parent.__dict__.get("ranges", {}))
        for name in inspect.get_annotations(parent):
            declared[name] = parent is base
    hints = typing.get_type_hints(cls)
    names = [
        n for n in declared if n not in ("params", *without) and typing.get_origin(hints[n]) is not typing.ClassVar
    ]
    options = [Option(n, hints[n], getattr(cls, n), ranges.get(n), shared=declared[n]) for n in names]
    return {option.name: option for option in sorted(options, key=lambda option: option.shared)}


def check_options(
    given: Mapping[str, Any], options: Mapping[str, Option], owner: str, also: Sequence[str] = ()
) -> dict[str, Any]:
    """Check options and convert them to their declared types.

    Args:
        given: Values by name.
        options: The declared options by name.
        owner: The optimizer, for the message.
        also: Names of other arguments, for the message.

    Raises:
        OptionError: for an unknown name, a value of another type, or a value out of range.
    """
    for name in given:
        if name not in options:
            hint = f" ({ELSEWHERE[name]})." if name in ELSEWHERE else "." + nearest(name, [*options, *also])
            raise OptionError(f"{owner} has no option {name!r}{hint} Its options are {', '.join([*options, *also])}.")
    return {name: options[name].checked(value, owner) for name, value in given.items()}


def signature(options: Mapping[str, Option]) -> inspect.Signature:
    """The signature of a constructor: `self`, `params`, the options of the page, then by keyword the shared ones."""
    parameter = inspect.Parameter
    own = [
        parameter(
            option.name,
            parameter.KEYWORD_ONLY if option.shared else parameter.POSITIONAL_OR_KEYWORD,
            default=option.default,
            annotation=option.type,
        )
        for option in options.values()
    ]
    first = [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "params")]
    return inspect.Signature([first[0], first[1].replace(annotation=Any), *own])


def _as_number(value: Any) -> str:
    """What to write instead of a text that reads like a number: to YAML 2e-3 is a word."""
    try:
        number = Decimal(value.strip()) if isinstance(value, str) else None
    except ArithmeticError:
        return ""
    return f" This is a text, as YAML reads it; write {number:f}." if number and number.is_finite() else ""


def describe(hint: Any) -> str:
    """A type in words.

    Example:
        >>> describe(tuple[float, float])
        'a list of 2 numbers'
        >>> describe(float | None)
        'a number or null'
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is tuple and args[-1] is ...:
        return f"a list of {describe(args[0]).split()[-1]}s"
    if origin is tuple:
        types_of_items = {describe(arg) for arg in args}
        words = types_of_items.pop().removeprefix("a ") + "s" if len(types_of_items) == 1 else "values"
        return f"a list of {len(args)} {words}"
    return {float: "a number", int: "an integer", bool: "true or false", str: "a string", type(None): "null"}[hint]


def is_near_miss(name: str, known: Iterable[str]) -> bool:
    """Whether a name is probably one of the known names, mistyped.

    Example:
        >>> is_near_miss("weight_decy", ["lr", "weight_decay"]), is_near_miss("lr_scale", ["lr", "weight_decay"])
        (True, False)
    """
    return bool(difflib.get_close_matches(name.lower(), [word.lower() for word in known], n=1, cutoff=0.8))


def plain(value: Any) -> Any:
    """A number or string of another library, such as NumPy's, as Python's; anything else as it is.

    A value of NumPy that holds one element becomes that element, and an array of one axis a list. A member of an enum
    of strings becomes its value.
    """
    if isinstance(value, torch.Tensor) or type(value) in (float, int, bool, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    axes = getattr(value, "ndim", None)
    if axes == 0 and hasattr(value, "item"):
        value = value.item()
    elif axes == 1 and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _converted(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    value = plain(value)
    if origin is typing.Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
        raise TypeError
    if origin in (typing.Union, types.UnionType):
        fitting = next((arg for arg in args if _fits(value, arg)), None)
        return _converted(value, fitting)
    if origin is tuple:
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            value = value.tolist()
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise TypeError
        if args[-1] is ...:
            args = args[:1] * len(value)
        if len(value) != len(args):
            raise TypeError
        return tuple(_converted(item, arg) for item, arg in zip(value, args, strict=True))
    if hint is float:
        return _as_float(value)
    if hint is None or type(value) is not hint:
        raise TypeError
    return value


def _as_float(value: Any) -> Any:
    """A number as a float; a tensor lr stays the tensor that the user changes in place."""
    if isinstance(value, torch.Tensor):
        number = value.dtype != torch.bool and not value.is_complex() and value.device.type != "meta"
        if value.numel() == 1 and number:
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise TypeError


def _numbers(value: Any) -> list[float]:
    """The numbers in a value of an option; an int too large for a float counts as infinite."""
    items = value if isinstance(value, tuple) else (value,)
    return [
        math.inf if isinstance(item, int) and abs(item) >= 2**63 else float(item)
        for item in items
        if isinstance(item, int | float | torch.Tensor)
    ]


def floats(value: Any) -> Any:
    """A value of an option with floats in the place of tensors."""
    if isinstance(value, tuple):
        return tuple(map(floats, value))
    return float(value) if isinstance(value, torch.Tensor) else value


def _fits(value: Any, hint: Any) -> bool:
    try:
        _converted(value, hint)
    except TypeError:
        return False
    return True


def _inside(value: Any, allowed: Range) -> bool:
    if isinstance(value, tuple):
        each = allowed if isinstance(allowed, tuple) else (allowed,) * len(value)
        return all(_inside(item, interval) for item, interval in zip(value, each, strict=True))
    if value is None or isinstance(value, str):
        return True
    number = float(value)
    allowed = str(allowed)
    if allowed == "any":
        return True
    if allowed.startswith((">", "<")):
        sign, bound = allowed.split()
        return {">=": number >= float(bound), ">": number > float(bound)}[sign]
    low, high = (float(end) for end in allowed[1:-1].split(","))
    above = number >= low if allowed[0] == "[" else number > low
    return above and (number <= high if allowed[-1] == "]" else number < high)
