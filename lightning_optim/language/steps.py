"""How a step ends: the weight decay, the step itself, and what "cautious" leaves out of both.

Cautious updates are Liang et al. 2024, arXiv:2411.16085, with the mean of the mask and its floor as in the authors'
program and in timm; cautious weight decay is arXiv:2510.12402, which decays where a step is zero too.
"""

from __future__ import annotations

from lightning_optim.language.math import count, maximum, sign, total, where
from lightning_optim.language.values import Condition, Operand, Options, Setting, Value

LEAST_SHARE = 1e-3  # a step of which less is left is not lengthened further


def penalized(p: Value, g: Value, h: Options, decoupled: Setting | bool = False) -> Value:
    """The gradient with the L2 penalty of a weight decay, unless the decay is decoupled.

    Args:
        p: The parameter.
        g: The gradient.
        h: The options, of which `weight_decay` is used.
        decoupled: Whether the decay acts on the parameter instead (`stepped`).
    """
    return g if decoupled else g + h.weight_decay * p


def stepped(
    p: Value, u: Value, g: Value, h: Options, decoupled: Setting | bool = True, share: Operand | None = None
) -> Value:
    """The parameter after a step and a decoupled weight decay: p (1 - lr weight_decay) - u.

    Args:
        p: The parameter.
        u: The step, learning rate included.
        g: The gradient, after the page's own clipping and without a penalty.
        h: The options, of which `lr`, `weight_decay`, `cautious` and `cautious_decay` are used.
        decoupled: Whether the parameter shrinks.
        share: The share of itself that the parameter loses, where that is not lr weight_decay.
    """
    if decoupled:
        p = where(decays(p, u, h), p * (1 - (h.lr * h.weight_decay if share is None else share)), p)
    return p - cautious(u, g, h)


def cautious(u: Value, g: Value, h: Options) -> Value:
    """The step itself; under `h.cautious` only where it goes against the gradient, and longer by what that leaves out.

    Signs are compared and not multiplied with sizes, since the product of two small numbers may be 0.
    """
    if not h.cautious:
        return u
    mask = where(sign(u) * g > 0, 1.0, 0.0)
    return u * mask / maximum(total(mask) / count(mask), LEAST_SHARE)


def decays(p: Value, u: Value, h: Options) -> Condition:
    """Where the parameter decays: everywhere, or under `h.cautious_decay` where the step does not make it larger."""
    return sign(u) * p >= 0 if h.cautious_decay else True
