"""The one exception for a wrong word: an option, a name or a parameter list that cannot be served."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard


class OptionError(ValueError, TypeError):
    """A name, an option or a parameter that cannot be served.

    It is a `ValueError` and a `TypeError` at once, since Python raises the one for a bad value and the other for an
    unknown keyword, and a config file does not tell them apart. The message says what was given, what is allowed
    and what to do.
    """


def check(owner: str, name: str, value: object, holds: bool, allowed: str) -> None:
    """Refuse an option that does not hold, in one sentence.

    Raises:
        OptionError: where `holds` is false.
    """
    if not holds:
        raise OptionError(f"{owner}: {name}={value!r} must be {allowed}.")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that can be compared: no NaN, and neither a word nor True.

    Example:
        >>> is_number(1e-3), is_number("1e-3"), is_number(True), is_number(float("nan"))
        (True, False, False, False)
    """
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and not math.isnan(value)


def is_whole(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an integer of at least `least`."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) >= least


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the words nearest to `word`, or nothing where none is near.

    Example:
        >>> nearest("adam2", ["adam", "adan", "lion"])
        ' Did you mean adam or adan?'
        >>> nearest("zzz", ["adam"])
        ''
    """
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), lowered, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(lowered[name] for name in close)}?" if close else ""
