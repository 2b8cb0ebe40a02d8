"""Sizes of memory in words, and the largest model that fits one."""

from __future__ import annotations

import re
from typing import Any

from lightning_optim.errors import OptionError, is_number, shown

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def read_size(size: Any) -> int:
    """Bytes, from a number or from words such as "24GB" (24 x 10^9), "24 GiB" (24 x 2^30) and "80G".

    Raises:
        OptionError: for anything else, and for a size that is not positive.

    Example:
        >>> read_size("24GB"), read_size("1.5 KiB"), read_size(100), read_size("1.5e9")
        (24000000000, 1536, 100, 1500000000)
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\+?\d\d?)?|\.\d+)\s*([kmgt]i?)?b?\s*", str(size).lower())
    if found is None or isinstance(size, bool) or not (isinstance(size, str) or is_number(size)):
        raise OptionError(f"fits={shown(size)} must be a size of memory, such as 24GB, 80GiB or a number of bytes.")
    value = int(float(found[1]) * UNITS[found[2] or ""])
    if not value:
        raise OptionError(f"fits={shown(size)}: a model needs more than no memory. Give a size such as 24GB.")
    return value


def largest(size: int, total: int, activations: int, parameters: int) -> int:
    """The parameters of the largest model that fits, at the same bytes for each and the same activations.

    Args:
        size: Bytes of a rank.
        total: What the rank with the most holds of a model.
        activations: Part of that for activations.
        parameters: The parameters of that model.

    Example:
        >>> largest(1600, total=160, activations=0, parameters=10)
        100
    """
    rest = total - activations
    return max(0, (size - activations) * parameters // rest) if rest > 0 else 0
