"""How much curvature an optimizer tolerates along each parameter: its learning rate, momentum and preconditioner.

Cohen et al. 2021, arXiv:2103.00065, for SGD; Cohen et al. 2022, arXiv:2207.14484, for Adam and RMSprop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.analysis.stability import stability_threshold
from lightning_optim.distributed.placement import local
from lightning_optim.errors import OptionError
from lightning_optim.storage.quantized import read_shaped

SGDS, ADAMS, RMSPROPS = {"SGD", "SGDW"}, {"Adam", "AdamW"}, {"RMSprop"}
UNKNOWN = ("cautious", "centered", "tf_style", "eps_in_sqrt")  # options under which a step is another one


class StepLimit(NamedTuple):
    """What a step along a parameter is.

    Attributes:
        lr: The learning rate that is applied.
        threshold: The largest stable eigenvalue of the Hessian, or of the preconditioned Hessian where there is a
            preconditioner; infinite for a learning rate of zero.
        preconditioner: What the gradient is divided by, element by element, on this process; None for SGD.
    """

    lr: float
    threshold: float
    preconditioner: Tensor | None


def is_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is SGD of this package or of torch, with or without momentum."""
    return bool(SGDS & _names(optimizer))


def step_limits(optimizer: torch.optim.Optimizer) -> dict[Tensor, StepLimit]:
    """The limit of each parameter of an optimizer.

    Args:
        optimizer: SGD, SGDW, Adam, AdamW or RMSprop of this package or of torch.

    Raises:
        OptionError: for another optimizer, whose preconditioner is not known here, and where an adaptive one has taken
            no step yet.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> step_limits(torch.optim.SGD([weight], lr=0.01, momentum=0.9))[weight].threshold
        380.0
    """
    found = {}
    for group in optimizer.param_groups:
        names = _names(optimizer)
        if not (SGDS | ADAMS | RMSPROPS) & names or any(group.get(option) for option in UNKNOWN):
            raise OptionError(f"for {type(optimizer).__name__} with these options no preconditioner is known")
        for p in group["params"]:
            found[p] = _limit(names, group, optimizer.state.get(p, {}))
    return found


def _limit(names: set[str], group: Mapping[str, Any], state: Mapping[str, Any]) -> StepLimit:
    lr, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
    if SGDS & names:
        nesterov = bool(group.get("nesterov"))
        dampening = float(group.get("dampening", 0.0)) if momentum else 0.0
        return _of(lr, momentum, "nesterov" if nesterov else "heavy_ball", dampening, None)
    if not state:
        raise OptionError("the optimizer has taken no step, so its preconditioner does not exist yet")
    if RMSPROPS & names:
        root = local(_slot(state, "square_avg")).sqrt()
        return _of(lr, momentum, "heavy_ball", 0.0, root.add_(float(group["eps"])))
    beta1, beta2 = map(float, group["betas"])
    t = float(state["step"])
    square = local(_slot(state, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"))
    root = (square / (1 - beta2**t)).sqrt_().add_(float(group["eps"]))
    return _of(lr, beta1, "ema", 0.0, root.mul_(1 - beta1**t))


def _of(lr: float, momentum: float, kind: Any, dampening: float, preconditioner: Tensor | None) -> StepLimit:
    if lr <= 0 or not 0 <= momentum < 1 or not 0 <= dampening < 1:
        return StepLimit(lr, math.inf, preconditioner)
    return StepLimit(lr, stability_threshold(lr, momentum, kind, dampening), preconditioner)


def _slot(state: Mapping[str, Any], name: str) -> Tensor:
    value = state[name]
    return value.detach() if isinstance(value, Tensor) else read_shaped(state, [name])[name]


def _names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Its class of torch or of this package; a class of somebody else that inherits from one may step otherwise."""
    cls = type(optimizer)
    while cls.__module__.partition(".")[0] not in ("torch", "lightning_optim") and cls.__base__ is not None:
        if "step" in vars(cls):
            return set()
        cls = cls.__base__
    return {cls.__name__}
