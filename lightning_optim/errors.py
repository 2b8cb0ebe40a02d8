"""The one exception for a wrong word: an option, a name or a parameter list that cannot be served."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OptionError(ValueError, TypeError):
    """A name, an option or a parameter that cannot be served.

    It is a `ValueError` and a `TypeError` at once, since Python raises the one for a bad value and the other for an
    unknown keyword, and a config file does not tell them apart. The message says what was given, what is allowed
    and what to do.
    """


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
