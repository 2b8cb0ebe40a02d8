"""What several methods share: averages, weight decay, momenta in turn, ratios of norms. Nothing here assigns a slot."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_optim.language.math import lerp, where
from lightning_optim.language.values import Condition, Operand, Options, Setting, Value


def ema(average: Operand, x: Operand, beta: Operand) -> Value:
    """One step of an exponential moving average: beta * average + (1 - beta) * x."""
    return lerp(average, x, 1 - beta)


def decayed(p: Value, g: Value, h: Options, decoupled: Condition) -> tuple[Value, Value]:
    """Parameter and gradient after weight decay: of the parameter (decoupled), or as an L2 penalty in the gradient."""
    return (p * (1 - h.lr * h.weight_decay), g) if decoupled else (p, g + h.weight_decay * p)


def in_turn(pos: Value, neg: Value, g: Value, odd: Condition, beta: Operand) -> tuple[Value, Value, Value, Value]:
    """Two momenta of which each takes in every other gradient (PNM).

    Returns:
        The new `pos`, which odd steps feed, and `neg`; then of these the one that was fed and the one that was not.
    """
    fresh, stale = ema(where(odd, pos, neg), g, beta), where(odd, neg, pos)
    return where(odd, fresh, pos), where(odd, neg, fresh), fresh, stale


def trust_ratio(w: Value, n: Value, ratio: Value) -> Value:
    """The rate of a tensor with norm `w` along a step with norm `n`: `ratio`, but 1 where one of the norms is zero."""
    return where(w > 0, where(n > 0, ratio, 1.0), 1.0)


def has_trust_ratio(h: Options, shape: Sequence[int], most_dims: int) -> Setting | bool:
    """Whether LARS and LAMB give a tensor a rate of its own.

    Vectors and single numbers (biases, norms) have none, unless `always_adapt` says so or no tensor has more axes;
    `adapt=False` switches all of it off.
    """
    return h.adapt and (h.always_adapt or len(shape) > 1 or most_dims <= 1)


def given(option: Setting | None) -> bool:
    """Whether an option that may be null is not null."""
    return option is not None
