"""KOALA's measurement: a Kalman filter of the weights observes the loss.  Davtyan et al. 2022, arXiv:2107.03331.

The loss is linearized around the weights, with the gradient as its slope, and its measured value is `loss_target`. Both
variants share this step. They differ in the covariance of the weights that they store.
"""

from __future__ import annotations

from typing import NamedTuple

from lightning_optim.language.math import maximum, total, where
from lightning_optim.language.values import Options, Value

# Tensors with a squared gradient norm below this do not move: the authors' implementation skips norms below 1e-9.
LEAST_SQUARE = 1e-18

REFUSES = {
    "maximize": "it walks towards a target of the loss",
    "cautious": "its variances shrink by the whole step, so that it cannot take a part",
    "cautious_decay": "its weight decay is a part of the loss that it measures",
}


class Measurement(NamedTuple):
    """The measurement of one tensor.

    Attributes:
        d: The direction of the step: the gradient of loss and penalty.
        step: The length of the step along `d` per unit of variance: lr times innovation over S.
        H: The largest |d|² / S of all tensors, by which the shared variance shrinks.
        counts: Whether the tensor moves: its gradient is not almost zero.
    """

    d: Value
    step: Value
    H: Value
    counts: Value


def loss_variance(mean: Value, h: Options) -> Value:
    """One step of the running mean of the squared distances of the losses of samples from their target."""
    around_target = h.loss_second_moment + h.loss_target * (h.loss_target - 2 * h.loss)
    return h.alpha_r * mean + (1 - h.alpha_r) * around_target


def measure(p: Value, g: Value, h: Options, P: Value, R: Value) -> Measurement:
    """The measurement of one tensor.

    Args:
        p: The parameter.
        g: The gradient.
        h: The options, and the loss.
        P: The variance of the weights.
        R: The variance of the loss.
    """
    d = g + h.weight_decay * p
    n = total(d * d)
    S = P * n + R
    innovation = maximum(h.loss + 0.5 * h.weight_decay * total(p * p) - h.loss_target, 0.0)
    counts = total(g * g) >= LEAST_SQUARE
    H = total(where(counts, n / S, 0.0), over="all", by="max")
    return Measurement(d, where(counts, h.lr * innovation / S, 0.0), H, counts)
