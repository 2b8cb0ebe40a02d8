"""Formulas that several pages share: averages, alternating momenta, ratios of norms.

No function here assigns a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_optim.language.math import lerp, sqrt, where
from lightning_optim.language.values import Condition, Operand, Options, Setting, Value


def ema(average: Operand, x: Operand, beta: Operand) -> Value:
    """One step of an exponential moving average: beta * average + (1 - beta) * x."""
    return lerp(average, x, 1 - beta)


def adam_step(lr: Operand, m: Value, v: Value, h: Options, eps: Operand) -> Value:
    """The step of Adam from its moments, whose bias corrections are `h.c1` and `h.c2`."""
    return lr / h.c1 * m / (sqrt(v) / sqrt(h.c2) + eps)


def in_turn(pos: Value, neg: Value, g: Value, odd: Condition, beta: Operand) -> tuple[Value, Value, Value, Value]:
    """One step of two momenta, each of which averages every other gradient (PNM).

    Returns:
        The new `pos`, which takes in the gradients of odd steps, the new `neg`, which takes in those of even steps, and
        of these two the one that took in `g` and the one that did not.
    """
    fresh, stale = ema(where(odd, pos, neg), g, beta), where(odd, neg, pos)
    return where(odd, fresh, pos), where(odd, neg, fresh), fresh, stale


def trust_ratio(w: Value, n: Value, ratio: Value) -> Value:
    """The factor on the learning rate of a tensor with norm `w` and a step of norm `n`.

    It is `ratio`, or 1 where one of the norms is zero.
    """
    return where(w > 0, where(n > 0, ratio, 1.0), 1.0)


def has_trust_ratio(h: Options, shape: Sequence[int], most_dims: int) -> Setting | bool:
    """Whether LARS and LAMB scale the learning rate of a tensor by its trust ratio.

    Tensors with fewer than two axes (biases, norms) have no trust ratio, unless `always_adapt` is set or no tensor has
    more axes. `adapt=False` switches trust ratios off.
    """
    return h.adapt and (h.always_adapt or len(shape) > 1 or most_dims <= 1)


def given(option: Setting | None) -> bool:
    """Whether an option that may be null is not null."""
    return option is not None
