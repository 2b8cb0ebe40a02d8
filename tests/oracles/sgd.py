"""SGD with an L2 penalty and momentum (Polyak 1964; Nesterov's form of Sutskever et al. 2013)."""

from __future__ import annotations

from collections.abc import Sequence

from .driver import Array, Gradients, History, Params, Slots, moved, run_per_tensor


def sgd(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> History:
    """Heavy ball whose first buffer is the undamped gradient, of which the penalty is a part."""

    def step(theta: Array, g: Array, s: Slots, t: int, eta: float) -> Array:
        raw, g = g, g + weight_decay * theta
        if momentum == 0:
            return moved(theta, eta * g, raw)
        s["b"] = g if t == 1 else momentum * s["b"] + (1 - dampening) * g
        return moved(theta, eta * (g + momentum * s["b"] if nesterov else s["b"]), raw)

    return run_per_tensor(step, params, gradients, lr=lr, lrs=lrs, maximize=maximize)
