"""RAdam's rectification of the variance of an adaptive rate.  Liu et al. 2019, arXiv:1908.03265, section 3."""

from __future__ import annotations

from typing import Any, overload

from lightning_optim.errors import OptionError
from lightning_optim.language.math import sqrt, where
from lightning_optim.language.values import Operand, Value

# Steps are rectified where rho is above this. The paper has 4, above which the variance exists; implementations have 5.
THRESHOLD = 5.0


@overload
def rectification(b2: float, t: int, threshold: float = THRESHOLD) -> tuple[bool, float]: ...


@overload
def rectification(b2: Value, t: Operand, threshold: Operand = THRESHOLD) -> tuple[Value, Value]: ...


def rectification(b2: Any, t: Any, threshold: Any = THRESHOLD) -> tuple[Any, Any]:
    """The rectification of step `t`.

    Args:
        b2: The decay of the second moment.
        t: The step counter.
        threshold: The length of the moving average above which its variance is tractable.

    Returns:
        Whether the variance of the second moment is tractable, and the factor r, which is 1 where it is not.
    """
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    tractable = rho > threshold
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return tractable, sqrt(where(tractable, r, 1.0))


def refuse_never_rectified(owner: str, b2: float, threshold: float = THRESHOLD) -> None:
    """Refuse a beta2 under which no step would ever be rectified.

    Raises:
        OptionError: where the moving average forgets so fast that it never gets as long as `threshold`.
    """
    if 2 / (1 - b2) - 1 <= threshold:
        raise OptionError(
            f"{owner}: betas[1]={b2!r} forgets so fast that no step would ever be rectified; "
            f"it must be above {1 - 2 / (threshold + 1):.3f}. Without an adaptive rate that is SGDW."
        )
