"""GradInit: learn one scale for each parameter tensor before training.  Zhu et al. 2021, arXiv:2102.08098.

The tensors are theta_i = alpha_i * theta_i0 (section 3). An iteration computes the gradient g on a batch S. If its norm
exceeds the bound gamma, the scales change to lower the norm. Otherwise a trial step with g is taken, and the scales
change to lower the loss after it, on a batch of which one half is new (Algorithm 1). The step is a constant in that
derivative, as in the authors' code. So any optimizer can take it, by its own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.training.trial_step import EPS, FirstStep, Gradients, Norm, Tensors, gradient_norm

Loss = Callable[[Tensors, Sequence[Any]], Tensor]
"""Parameters by name and some half-batches to the loss over all of these."""
Branch = Literal["objective", "constraint"]


@dataclass(frozen=True)
class Iteration:
    """The result of one iteration.

    Attributes:
        branch: "objective" if a trial step was taken, "constraint" if the gradient's norm exceeded the bound.
        loss: Loss of the batch before the step.
        norm: Norm of the gradient, over all tensors.
        loss_after: Loss after the trial step, on a batch of which one half is new; None without a trial step.
    """

    branch: Branch
    loss: float
    norm: float
    loss_after: float | None


@dataclass
class _Moments:
    """Adam's moments of one scale: a first moment for each branch, and one second moment."""

    first: dict[str, float] = field(default_factory=lambda: {"objective": 0.0, "constraint": 0.0})
    second: float = 0.0


class ScaleSearch:
    """Adam on the scales of some parameters.

    A tensor of zeros has no scale. It still counts in the gradient, its norm and the trial step. A scale never falls
    below its least value, and a scale that reached 0 stays 0.

    Args:
        params: The initial parameters by name. They are not changed.
        loss: The loss as a function of parameters and half-batches.
        first_step: The trial step.
        eta: Learning rate of the trial step; the loss after the step is divided by it.
        gamma: Upper bound of the gradient's norm.
        norm: The norm to bound: 2 is Euclidean, 1 the sum of absolute values.
        lr: Learning rate of Adam on the scales.
        betas: Adam's decays.
        clip: Bound on the absolute value of the derivative with respect to a scale.
        least: The least value of each scale, by parameter name.
        second_order: Also differentiate through the trial step.

    Attributes:
        scales: The scales so far, by parameter name; 1 at the beginning.
    """

    def __init__(
        self,
        params: Tensors,
        loss: Loss,
        first_step: FirstStep,
        *,
        eta: float,
        gamma: float,
        norm: Norm,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = math.inf,
        least: Mapping[str, float],
        second_order: bool = False,
    ) -> None:
        self.first = {name: p.detach() for name, p in params.items()}
        self.loss, self.first_step = loss, first_step
        self.eta, self.gamma = eta, gamma
        self.norm: Norm = norm
        self.lr, self.betas, self.clip, self.least = lr, betas, clip, least
        self.second_order = second_order
        self.scales = {name: 1.0 for name, p in self.first.items() if bool((p != 0).any())}
        self.count = {"objective": 0, "constraint": 0}
        self._moments = {name: _Moments() for name in self.scales}

    def parameters(self) -> Tensors:
        """The parameters times their scales."""
        return {name: p * self.scales[name] if name in self.scales else p.clone() for name, p in self.first.items()}

    def iterate(self, halves: Iterator[Any]) -> Iteration:
        """Run one iteration. It takes two half-batches for the gradient, and one more for a trial step.

        Raises:
            FloatingPointError: if a loss or the gradient's norm is not finite.
        """
        a, b = next(halves), next(halves)
        theta = {name: p.requires_grad_() for name, p in self.parameters().items()}
        loss = self.loss(theta, (a, b))
        grads = _gradients(loss, theta, retain_graph=True, create_graph=self.second_order)
        size = gradient_norm(grads, self.norm)
        _check_finite(f"the loss is {loss.item()} and the gradient's norm {size.item()}", loss, size)
        branch: Branch = "constraint" if size > self.gamma else "objective"
        loss_after: float | None = None
        if branch == "constraint":
            objective = gradient_norm(_gradients(loss, theta, create_graph=True), self.norm)
            slopes = _gradients(objective, theta)
        else:
            moved = self.first_step(theta, grads, loss)
            if not self.second_order:
                moved = {name: p.detach().requires_grad_() for name, p in moved.items()}
            loss = loss.detach()  # frees the graph
            later = self.loss(moved, (a, next(halves)))
            loss_after = later.item()
            _check_finite(f"the loss after a trial step is {loss_after}", later)
            slopes = _gradients(later / self.eta, theta if self.second_order else moved)
        self._update_scales(branch, slopes)
        return Iteration(branch, loss.item(), size.item(), loss_after)

    def _update_scales(self, branch: Branch, grads: Gradients) -> None:
        """One step of Adam on the scales, with the first moments of this branch and the second moments of both."""
        self.count[branch] += 1
        present = {name: g for name in self.scales if (g := grads[name]) is not None}
        slopes = {name: (g * self.first[name]).sum(dtype=torch.float64) for name, g in present.items()}
        values = torch.stack(list(slopes.values())).tolist() if slopes else []
        (beta1, beta2), (k, both) = self.betas, (self.count[branch], sum(self.count.values()))
        for name, value in zip(slopes, values, strict=True):
            q, m = min(max(value, -self.clip), self.clip), self._moments[name]
            m.first[branch] = beta1 * m.first[branch] + (1 - beta1) * q
            m.second = beta2 * m.second + (1 - beta2) * q * q
            step = m.first[branch] / (1 - beta1**k) / (math.sqrt(m.second / (1 - beta2**both)) + EPS)
            if self.scales[name]:
                self.scales[name] = max(self.scales[name] - self.lr * step, self.least[name])


def _gradients(output: Tensor, theta: Tensors, **options: Any) -> dict[str, Tensor | None]:
    grads = torch.autograd.grad(output, list(theta.values()), allow_unused=True, **options)
    return dict(zip(theta, grads, strict=True))


def _check_finite(what: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(value)) for value in values):
        raise FloatingPointError(
            f"GradInit stopped: {what}. Lower eta or lr, lower gamma so that the gradient is bounded, or look at the "
            "first batch and the initial weights."
        )
