"""GradInit: learn how each parameter tensor is scaled before training.  Zhu et al. 2021, arXiv:2102.08098.

The tensors are theta_i = alpha_i * theta_i0. An iteration looks at the gradient g on a batch S. Where its norm is over
the bound, the scales are moved to make the norm smaller. Otherwise a trial step is taken with g, and the scales are
moved to make the loss after it smaller, on a batch of which one half is new. The step is held constant in that
derivative, as in the authors' program (theirs is for the sign of the gradient and for the gradient itself): so any
optimizer can take it, by its own code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_optim.distributed.ranks import alone
from lightning_optim.errors import OptionError

Tensors = dict[str, Tensor]
Loss = Callable[[Tensors, Sequence[Any]], Tensor]  # of the parameters by name, over some half-batches together
FirstStep = Callable[[Tensors, Mapping[str, Tensor | None], Tensor], Tensors]  # parameters, gradients, loss
Norm = Literal[1, 2]

# The directions of the paper, which are walked for a distance eta.
DIRECTIONS: dict[str, Norm] = {"sgd": 2, "normalized_sgd": 2, "adam": 1}

EPS = 1e-8
ALIKE = 0.9  # cosine from which on a step goes along something


@dataclass(frozen=True)
class Iteration:
    """What one iteration found.

    Attributes:
        branch: "objective" where a trial step was taken, "constraint" where the gradient was over the bound.
        loss: Of the batch, before the step.
        norm: Of the gradient, all tensors together.
        loss_after: Of the half new batch after the trial step, or None.
    """

    branch: Literal["objective", "constraint"]
    loss: float
    norm: float
    loss_after: float | None


@dataclass
class _Moments:
    """Adam's, for one scale: a first moment for each branch, and one second moment."""

    first: dict[str, float] = field(default_factory=lambda: {"objective": 0.0, "constraint": 0.0})
    second: float = 0.0


class ScaleSearch:
    """The iterations, over given parameters and losses.

    A tensor of zeros has no scale; it takes part in the gradient, its norm and the trial step. A scale stays at or
    above its least value, and one that has come to 0 stays there.

    Args:
        params: The parameters before, by name. They are not changed.
        loss: The loss of parameters over half-batches.
        first_step: The parameters after the trial step.
        eta: What the loss after the step is divided by: the learning rate of the step.
        gamma: Bound on the gradient's norm.
        norm: Which: 2 is Euclidean, 1 the sum of absolute values.
        lr: How far Adam moves a scale in one iteration.
        betas: Adam's decays.
        clip: Bound on the derivative by a scale, from above and below.
        least: The least value of each scale, by the parameter's name.
        second_order: Differentiate through the trial step too.
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
        self.eta, self.gamma, self.norm = eta, gamma, norm
        self.lr, self.betas, self.clip, self.least = lr, betas, clip, least
        self.second_order = second_order
        self.scales = {name: 1.0 for name, p in self.first.items() if bool((p != 0).any())}
        self.count = {"objective": 0, "constraint": 0}
        self._moments = {name: _Moments() for name in self.scales}

    def parameters(self) -> Tensors:
        """The parameters as they are scaled now."""
        return {name: p * self.scales[name] if name in self.scales else p.clone() for name, p in self.first.items()}

    def iterate(self, halves: Iterator[Any]) -> Iteration:
        """One iteration: two half-batches for the gradient, and where a trial step is taken one more.

        Raises:
            FloatingPointError: where a loss or the norm is not a finite number.
        """
        a, b = next(halves), next(halves)
        theta = {name: p.requires_grad_() for name, p in self.parameters().items()}
        loss = self.loss(theta, (a, b))
        grads = _gradients(loss, theta, retain_graph=True, create_graph=self.second_order)
        size = _norm(grads, self.norm)
        _finite(f"the loss is {loss.item()} and the gradient's norm {size.item()}", loss, size)
        if size > self.gamma:
            branch, after = "constraint", None
            objective = _norm(_gradients(loss, theta, create_graph=True), self.norm)
            found = _gradients(objective, theta)
        else:
            branch = "objective"
            moved = self.first_step(theta, grads, loss)
            if not self.second_order:
                moved = {name: p.detach().requires_grad_() for name, p in moved.items()}
            loss = loss.detach()  # lets go of the graph
            later = self.loss(moved, (a, next(halves)))
            after = later.item()
            _finite(f"the loss after a trial step is {after}", later)
            found = _gradients(later / self.eta, theta if self.second_order else moved)
        self._move(branch, found)
        return Iteration(branch, loss.item(), size.item(), after)  # type: ignore[arg-type]

    def _move(self, branch: str, by_tensor: Mapping[str, Tensor | None]) -> None:
        """Adam on the scales; the moments of the branch, and the second moment of both."""
        self.count[branch] += 1
        found = {name: by_tensor[name] for name in self.scales}
        slopes = {n: (g * self.first[n]).sum(dtype=torch.float64) for n, g in found.items() if g is not None}
        values = torch.stack(list(slopes.values())).tolist() if slopes else []
        (beta1, beta2), (k, both) = self.betas, (self.count[branch], sum(self.count.values()))
        for name, value in zip(slopes, values, strict=True):
            q, m = min(max(value, -self.clip), self.clip), self._moments[name]
            m.first[branch] = beta1 * m.first[branch] + (1 - beta1) * q
            m.second = beta2 * m.second + (1 - beta2) * q * q
            step = m.first[branch] / (1 - beta1**k) / (math.sqrt(m.second / (1 - beta2**both)) + EPS)
            if self.scales[name]:
                self.scales[name] = max(self.scales[name] - self.lr * step, self.least[name])


def along(direction: str, eta: float) -> FirstStep:
    """The paper's trial steps, of length `eta`: along the gradient, the same with norm 1, or along its sign."""

    def first_step(theta: Tensors, grads: Mapping[str, Tensor | None], loss: Tensor) -> Tensors:
        length = 1 / _norm(grads, 2).clamp_min(EPS) if direction == "normalized_sgd" else 1.0

        def of(p: Tensor, g: Tensor | None) -> Tensor:
            if g is None:
                return p
            return p - eta * (torch.sign(g) if direction == "adam" else g * length)

        return {name: of(p, grads[name]) for name, p in theta.items()}

    return first_step


def rates_of(optimizer: torch.optim.Optimizer, eta: float | None) -> list[float]:
    """The learning rate of each group, before a schedule changed it; with `eta` all scaled so that the largest is that.

    Empty for an optimizer without learning rates.
    """
    groups = optimizer.param_groups
    if not all("lr" in group for group in groups):
        return []
    found = [float(group.get("initial_lr", group["lr"])) for group in groups]
    return found if eta is None or not max(found) else [rate * eta / max(found) for rate in found]


def taken_by(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], rates: Sequence[float]) -> FirstStep:
    """The first step of an optimizer that has not taken one, by its own code on copies of its parameters.

    Args:
        optimizer: It stays as it is.
        params: Its parameters by the names under which they will come.
        rates: The learning rate for each of its groups; empty where it has none.

    Raises:
        OptionError: by the function that is returned, where the optimizer cannot do that.
    """
    others = {id(p): p for group in optimizer.param_groups for p in group["params"]}

    def first_step(theta: Tensors, grads: Mapping[str, Tensor | None], loss: Tensor) -> Tensors:
        twins = {name: nn.Parameter(p.detach().clone()) for name, p in theta.items()}
        for name, twin in twins.items():
            grad = grads[name]
            twin.grad = None if grad is None else grad.detach().clone()
        memo: dict[int, Any] = {**others, **{id(params[name]): twin for name, twin in twins.items()}}
        value: Any = loss.detach()
        try:
            own = copy.deepcopy(optimizer, memo)
            for group, rate in zip(own.param_groups, rates, strict=False):
                group["lr"] = rate
            with alone():
                type(own).step(own, lambda: value)  # of the class: a scheduler replaces the instance's by its own
        except Exception as error:
            raise OptionError(
                f"GradInit cannot let {type(optimizer).__name__} take a trial step ({type(error).__name__}: {error}). "
                "Let it follow a step of the paper instead: follow='sgd', 'normalized_sgd' or 'adam'."
            ) from error
        return {name: twin.detach() for name, twin in twins.items()}

    return first_step


def norm_of(first_step: FirstStep, params: Mapping[str, Tensor], owner: str) -> Norm:
    """The norm in which the gradient is to be bounded: 2 where a first step goes along it, 1 where along its sign.

    The step on tensors of zeros tells, with a gradient whose elements differ: there neither weight decay nor the size
    of a tensor plays a part.

    Args:
        first_step: The step.
        params: Parameters like those that it will get, for their shapes.
        owner: Who takes the step, for people.

    Raises:
        OptionError: where it goes along neither.
    """
    theta = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    grads = {name: (torch.arange(p.numel(), device=p.device) % 4 + 1.0).view_as(p) for name, p in theta.items()}
    loss = torch.ones((), device=next(iter(theta.values())).device)
    moved = first_step(theta, grads, loss)
    gradient, sign = [], []
    for name, g in grads.items():
        step = -moved[name]
        if step.numel() > 1 and bool(step.any()):
            gradient.append(torch.cosine_similarity(step.flatten(), g.flatten(), 0).item())
            sign.append(torch.cosine_similarity(step.flatten(), torch.ones_like(g).flatten(), 0).item())
    both = [sum(found) / max(1, len(found)) for found in (gradient, sign)]
    if max(both) < ALIKE:
        raise OptionError(
            f"GradInit cannot tell whether the first step of {owner} goes along the gradient or along its sign. Say in "
            "which norm the gradient is to be bounded: norm=2 as for SGD, or norm=1 as for Adam."
        )
    return 2 if both[0] >= both[1] else 1


def _gradients(of: Tensor, theta: Tensors, **options: Any) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(of, list(theta.values()), allow_unused=True, **options)
    return dict(zip(theta, found, strict=True))


def _norm(grads: Mapping[str, Tensor | None], norm: Norm) -> Tensor:
    """Of all tensors together, in float64."""
    present = [g for g in grads.values() if g is not None]
    powers = torch.stack([(g.abs() if norm == 1 else g * g).sum(dtype=torch.float64) for g in present])
    return powers.sum() if norm == 1 else powers.sum().sqrt()


def _finite(what: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(value)) for value in values):
        raise FloatingPointError(
            f"GradInit stopped: {what}. Lower eta or lr, lower gamma so that the gradient is bounded, or look at the "
            "first batch and the initial weights."
        )
