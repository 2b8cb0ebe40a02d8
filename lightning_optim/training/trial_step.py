"""The first step of an optimizer as a function of parameters and gradients, as GradInit needs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_optim.distributed.ranks import alone
from lightning_optim.errors import OptionError

Tensors = dict[str, Tensor]
Gradients = Mapping[str, Tensor | None]
FirstStep = Callable[[Tensors, Gradients, Tensor], Tensors]
"""Parameters, gradients and loss to new parameters, by name."""
Norm = Literal[1, 2]

EPS = 1e-8
ALIKE = 0.9  # a step has a direction if its cosine with it is at least this


class Direction(NamedTuple):
    """A trial step of the paper.

    Attributes:
        norm: The norm of the gradient that the paper bounds for this step.
        eta: The paper's learning rate.
    """

    norm: Norm
    eta: float


DIRECTIONS: dict[str, Direction] = {
    "sgd": Direction(2, 0.1),
    "normalized_sgd": Direction(2, 0.1),
    "adam": Direction(1, 1e-3),
}
ADVICE = "Use a trial step of the paper instead: follow='sgd', 'normalized_sgd' or 'adam'."


def along(direction: str, eta: float) -> FirstStep:
    """A trial step of the paper.

    Args:
        direction: "sgd" is the gradient, "normalized_sgd" the gradient divided by its norm, "adam" its sign.
        eta: Learning rate.

    Example:
        >>> step = along("adam", 0.1)
        >>> step({"w": torch.ones(2)}, {"w": torch.tensor([3.0, -2.0])}, torch.tensor(0.0))
        {'w': tensor([0.9000, 1.1000])}
    """

    def first_step(theta: Tensors, grads: Gradients, loss: Tensor) -> Tensors:
        length = 1 / gradient_norm(grads, 2).clamp_min(EPS) if direction == "normalized_sgd" else 1.0

        def moved(p: Tensor, g: Tensor | None) -> Tensor:
            if g is None:
                return p
            return p - eta * (torch.sign(g) if direction == "adam" else g * length)

        return {name: moved(p, grads[name]) for name, p in theta.items()}

    return first_step


def base_rates(optimizer: torch.optim.Optimizer, eta: float | None) -> list[float]:
    """The learning rate of each parameter group without the factor of a scheduler.

    Args:
        optimizer: Any optimizer.
        eta: If given, all rates are scaled so that the largest equals it.

    Returns:
        One rate for each group; an empty list for an optimizer without learning rates.
    """
    groups = optimizer.param_groups
    if not all("lr" in group for group in groups):
        return []
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    return rates if eta is None or not max(rates) else [rate * eta / max(rates) for rate in rates]


def taken_by(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], rates: Sequence[float]) -> FirstStep:
    """The first step of an optimizer, computed by a copy of it on copies of its parameters.

    Args:
        optimizer: An optimizer that has not taken a step. It is not changed.
        params: Its parameters by the names under which the trial step gets them.
        rates: The learning rate of each parameter group; empty to leave them.

    Raises:
        OptionError: when the step is called, if the optimizer cannot be copied or cannot take a step on one process.
    """
    all_params = {id(p): p for group in optimizer.param_groups for p in group["params"]}

    def first_step(theta: Tensors, grads: Gradients, loss: Tensor) -> Tensors:
        copies = {name: nn.Parameter(p.detach().clone()) for name, p in theta.items()}
        for name, p in copies.items():
            grad = grads[name]
            p.grad = None if grad is None else grad.detach().clone()
        # deepcopy takes these instead of the parameters; parameters that do not take part are not copied at all.
        memo: dict[int, Any] = {**all_params, **{id(params[name]): p for name, p in copies.items()}}
        value: Any = loss.detach()
        try:
            stepper = copy.deepcopy(optimizer, memo)
            for group, rate in zip(stepper.param_groups, rates, strict=False):
                group["lr"] = rate
            with alone():
                type(stepper).step(stepper, lambda: value)  # not the instance's `step`, which a scheduler replaces
        except Exception as error:
            raise OptionError(
                f"GradInit cannot let {type(optimizer).__name__} take a trial step ({type(error).__name__}: {error}). "
                f"{ADVICE}"
            ) from error
        return {name: p.detach() for name, p in copies.items()}

    return first_step


def norm_of(first_step: FirstStep, params: Mapping[str, Tensor], owner: str) -> Norm:
    """The norm of the gradient to bound: 2 if a first step is along the gradient, 1 if along its sign.

    The step is taken from zeros, with a gradient of different values. There neither weight decay nor the size of a
    tensor has an influence.

    Args:
        first_step: The step.
        params: The parameters, for their names and shapes.
        owner: The name of the optimizer, for messages.

    Raises:
        OptionError: if the step is along neither.
    """
    theta = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    grads = {name: _digits(p) for name, p in theta.items()}
    loss = next(iter(theta.values())).new_ones(())
    moved = first_step(theta, grads, loss)
    with_gradient, with_sign = [], []
    for name, g in grads.items():
        step = -moved[name]
        if step.numel() > 1 and bool(step.any()):
            with_gradient.append(torch.cosine_similarity(step.flatten(), g.flatten(), 0).item())
            with_sign.append(torch.cosine_similarity(step.flatten(), torch.ones_like(g).flatten(), 0).item())
    if not with_gradient:
        raise OptionError(
            f"GradInit looks at the first step of an optimizer, and that of {owner} moves nothing. Leave GradInit out, "
            "or train with another optimizer."
        )
    means = [sum(cosines) / max(1, len(cosines)) for cosines in (with_gradient, with_sign)]
    if max(means) < ALIKE:
        raise OptionError(
            f"GradInit cannot tell whether the first step of {owner} is along the gradient or along its sign. Set the "
            "norm of the gradient to bound: norm=2 as for SGD, or norm=1 as for Adam."
        )
    return 2 if means[0] >= means[1] else 1


def _digits(p: Tensor) -> Tensor:
    """A gradient of different values: 1, 2, 3, 4, 1, ... in the shape of `p`."""
    return (torch.arange(p.numel(), dtype=torch.int64, device=p.device) % 4 + 1).to(p.dtype).view_as(p)


def gradient_norm(grads: Gradients, norm: Norm) -> Tensor:
    """The norm over all tensors together, in float64."""
    present = [g for g in grads.values() if g is not None]
    powers = torch.stack([(g.abs() if norm == 1 else g * g).sum(dtype=torch.float64) for g in present])
    return powers.sum() if norm == 1 else powers.sum().sqrt()
