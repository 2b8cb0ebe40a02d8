"""KOALA's measurement: a Kalman filter of the weights observes the loss.  Davtyan et al. 2022, arXiv:2107.03331.

The loss is linear around the weights, with the gradient as its slope, and should be `loss_target`. Both variants
share this step and differ in what they keep of the weights' covariance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_optim.errors import OptionError
from lightning_optim.language.math import maximum, total, where
from lightning_optim.language.values import Options, Value

# A tensor whose squared gradient norm is below this is left alone: the authors' program skips norms below 1e-9.
LEAST_SQUARE = 1e-18


class Measurement(NamedTuple):
    """What the loss says about one tensor.

    Attributes:
        d: The direction: the gradient of loss and penalty.
        step: The length of the step along `d` for each unit of variance: lr times innovation over S.
        H: The largest |d|² / S of all tensors, by which the shared variance shrinks.
        counts: Whether this tensor counts.
    """

    d: Value
    step: Value
    H: Value
    counts: Value


def loss_variance(known: Value, h: Options) -> Value:
    """A running mean of the squared distance of the samples' losses from their target."""
    around_target = h.loss_second_moment + h.loss_target * (h.loss_target - 2 * h.loss)
    return h.alpha_r * known + (1 - h.alpha_r) * around_target


def measure(p: Value, g: Value, h: Options, P: Value, R: Value) -> Measurement:
    """The measurement of one tensor whose weights have variance `P`, by a loss that has variance `R`."""
    d = g + h.weight_decay * p
    n = total(d * d)
    S = P * n + R
    innovation = maximum(h.loss + 0.5 * h.weight_decay * total(p * p) - h.loss_target, 0.0)
    counts = total(g * g) >= LEAST_SQUARE
    H = total(where(counts, n / S, 0.0), over="all", by="max")
    return Measurement(d, where(counts, h.lr * innovation / S, 0.0), H, counts)


def refuse_maximize(owner: str, options: dict[str, Any]) -> None:
    """Refuse to walk uphill.

    Raises:
        OptionError: for `maximize=True`.
    """
    if options["maximize"]:
        raise OptionError(f"{owner}: maximize=True has no meaning; it walks towards a target of the loss.")
