"""The exceptions of the package, and helpers to check options."""

from __future__ import annotations

import difflib
import importlib.util
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard


class OptionError(ValueError, TypeError):
    """An option, a name or a parameter is not valid.

    It is both a `ValueError` and a `TypeError`: Python raises the first for a bad value and the second for an unknown
    keyword, and a config file does not tell the two apart. The message says what was given, what is allowed and what
    to do.
    """


class EngineError(RuntimeError):
    """An engine cannot run a step after all: a kernel can neither be loaded nor compiled.

    Nothing has changed then. Under `engine="auto"` the next engine runs the step.
    """


class MissingPackageError(OptionError, ImportError):
    """A package that an extra of this one brings is not installed. The message has the command that installs it."""


EXTRAS = {"matplotlib": "plots", "tensorboard": "tensorboard", "sklearn": "examples", "triton": "triton"}


def pip_command(module: str) -> str:
    """The command that installs a package of an extra.

    Example:
        >>> pip_command("matplotlib")
        "pip install 'lightning-optim[plots]'"
    """
    return f"pip install 'lightning-optim[{EXTRAS[module.partition('.')[0]]}]'"


def needed(module: str, owner: str) -> Any:
    """Import a module of a package that an extra brings.

    Args:
        module: Its full name, such as "matplotlib.figure".
        owner: What needs it, for the message: "The picture of `lightning-optim memory`".

    Returns:
        The module.

    Raises:
        MissingPackageError: if its package is not installed, or does not import.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = importlib.util.find_spec(package) is None
        why = "is not installed" if missing else f"does not import ({first_line(error).rstrip('.')})"
        raise MissingPackageError(f"{owner} needs {package}, which {why}. Type: {pip_command(module)}") from error


def check(owner: str, name: str, value: object, holds: bool, allowed: str) -> None:
    """Raise `OptionError` unless `holds`.

    Args:
        owner: The class whose option it is, for the message.
        name: The option.
        value: The value that was given.
        holds: Whether the value is allowed.
        allowed: What is allowed, as it completes "must be".

    Raises:
        OptionError: where `holds` is false.
    """
    if not holds:
        raise OptionError(f"{owner}: {name}={shown(value)} must be {allowed}.")


def check_choice(owner: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse an option that is none of the choices.

    Raises:
        OptionError: if it is none of them.

    Example:
        >>> check_choice("LookaheadSync", "evaluate", "both", ["fast", "slow"])
        Traceback (most recent call last):
        ...
        lightning_optim.errors.OptionError: LookaheadSync: evaluate='both' must be 'fast' or 'slow'.
    """
    words = [repr(choice) for choice in choices]
    known = isinstance(value, str | int | float | None) and value in choices  # an array has no answer to `in`
    check(owner, name, value, known, f"{', '.join(words[:-1])} or {words[-1]}")


def shown(value: object) -> str:
    """A value as it stands in a message: its repr, at most 80 characters of it on one line.

    Example:
        >>> shown("fast"), shown(10**5000)
        ("'fast'", 'an int')
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of more digits than Python prints, or a repr that fails
        return f"an {type(value).__name__}" if type(value).__name__[0] in "aeiou" else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number other than NaN that fits a float. A bool is not a number.

    Example:
        >>> is_number(1e-3), is_number("1e-3"), is_number(True), is_number(float("nan"))
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def is_whole(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an integer of at least `least` that fits 64 bits."""
    whole = not isinstance(value, bool) and isinstance(value, numbers.Integral)
    return whole and least <= int(value) < 2**64


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name where it says nothing, as a sentence.

    Example:
        >>> first_line(OSError("no space is left\\nin this folder")), first_line(KeyError())
        ('no space is left.', 'KeyError.')
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if lines[0].endswith(("!", "?")) else lines[0].rstrip(".:") + "."


def nearest(word: str, known: Iterable[str]) -> str:
    """The question "Did you mean ...?" with the known words most similar to `word`; empty where none is.

    Example:
        >>> nearest("adam2", ["adam", "adan", "lion"])
        ' Did you mean adam or adan?'
        >>> nearest("zzz", ["adam"])
        ''
    """
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), lowered, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(lowered[name] for name in close)}?" if close else ""


def option_error(error: BaseException | None) -> OptionError | None:
    """The `OptionError` behind an error of the parser or of a class that it instantiated.

    An import that failed for want of a package of an extra is one too: `TensorBoardLogger` without tensorboard.
    """
    while error is not None and not isinstance(error, OptionError):
        if isinstance(error, ImportError) and (missing := _missing(error)):
            return MissingPackageError(f"{missing} is needed, and is not installed. Type: {pip_command(missing)}")
        error = error.__cause__ or error.__context__
    return error


def _missing(error: ImportError) -> str | None:
    """The package of an extra of which an error of an import speaks, if it is not installed."""
    named = (package for package in EXTRAS if error.name == package or f"`{package}`" in str(error))
    return next((package for package in named if importlib.util.find_spec(package) is None), None)
