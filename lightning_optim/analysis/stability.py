"""The largest curvature that an optimizer tolerates on a quadratic: the edge of stability.

Cohen, Kaur, Li, Kolter & Talwalkar 2021, "Gradient descent on neural networks typically occurs at the edge of
stability", arXiv:2103.00065; Cohen et al. 2022, "Adaptive gradient methods at the edge of stability", arXiv:2207.14484.
"""

from __future__ import annotations

import math
from typing import Literal

from lightning_optim import errors
from lightning_optim.errors import is_number

Momentum = Literal["heavy_ball", "nesterov", "ema"]


def stability_threshold(
    lr: float, momentum: float = 0.0, kind: Momentum = "heavy_ball", dampening: float = 0.0
) -> float:
    """The largest eigenvalue of the Hessian, or of the preconditioned Hessian, up to which steps do not diverge.

    Args:
        lr: Learning rate, above 0; it counts the same wherever it is applied.
        momentum: Momentum β in [0, 1).
        kind: How momentum enters: "heavy_ball" is m ← β m + g, as in torch's SGD, with the threshold 2 (1 + β) / lr;
            "nesterov" is the same with Nesterov's look ahead, 2 (1 + β) / (lr (1 + 2 β)); "ema" is m ← β m + (1 - β) g,
            as in Adam, 2 (1 + β) / (lr (1 - β)).
        dampening: That of torch's SGD, in [0, 1): the gradient enters its momentum times 1 - dampening. Without
            momentum it has no effect, and Nesterov's has none.

    Raises:
        OptionError: if an argument is out of range.

    Example:
        >>> [round(stability_threshold(0.01, beta, kind), 4) for beta, kind in
        ...  [(0.0, "heavy_ball"), (0.9, "heavy_ball"), (0.9, "nesterov"), (0.9, "ema")]]
        [200.0, 380.0, 135.7143, 3800.0]
    """
    owner = "stability_threshold"
    errors.check(owner, "lr", lr, is_number(lr) and 0 < lr < math.inf, "a number above 0")
    errors.check_choice(owner, "kind", kind, ["heavy_ball", "nesterov", "ema"])
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        errors.check(owner, name, value, is_number(value) and 0 <= value < 1, "in [0, 1)")
    fits = kind == "heavy_ball" or dampening == 0
    errors.check(owner, "dampening", dampening, fits, f"0 where kind={kind!r}; only 'heavy_ball' knows it")
    if kind == "ema":
        return 2 * (1 + momentum) / (lr * (1 - momentum))
    if kind == "nesterov":
        return 2 * (1 + momentum) / (lr * (1 + 2 * momentum))
    return 2 * (1 + momentum) / (lr * (1 - dampening if momentum else 1))
