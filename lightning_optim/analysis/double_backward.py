"""Products with the Hessian and with the generalised Gauss-Newton matrix by differentiating twice, on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_optim.analysis.graphs import dead_end, has_functions_of_users, wrong_twice
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.errors import OptionError


class Hessian:
    """v to H v, exact. The graph of the gradient is built once and kept: a product is one backward pass through it.

    Args:
        space: The space of vectors.
        loss: The loss of this rank, with its graph.

    Attributes:
        doubtful: Whether the graph may lack something, so that a product should be compared with differences.

    Raises:
        RuntimeError: where the graph of the gradient cannot be differentiated.
    """

    def __init__(self, space: Vectors, loss: Tensor) -> None:
        self.space = space
        grads = torch.autograd.grad(loss, space.params, create_graph=True, allow_unused=True)
        found = [g for g in grads if g is not None]
        self._grads = {i: g for i, g in enumerate(grads) if g is not None and g.requires_grad}
        if problem := dead_end(found) or wrong_twice(loss):
            raise RuntimeError(problem)
        self.doubtful = len(found) > len(self._grads) or has_functions_of_users([loss])

    def __call__(self, v: Tensor, norm: float | None = None) -> Tensor:
        if not self._grads:
            return self.space.zeros()
        along = self.space.tensors(v)
        grads, given = list(self._grads.values()), [along[i] for i in self._grads]
        return self.space.flat(
            torch.autograd.grad(grads, self.space.params, given, retain_graph=True, allow_unused=True)
        )


class GaussNewton:
    """v to J^T H_L J v, exact, with J the Jacobian of the outputs and H_L the Hessian of the loss of the outputs.

    J v is the derivative of u -> J^T u, which is linear, so that two backward passes make it.

    Args:
        space: The space of vectors.
        outputs: The outputs of the model, with their graph.
        loss: The loss of the outputs: a function of them, or its value with its graph.

    Attributes:
        doubtful: As that of `Hessian`.

    Raises:
        RuntimeError: where the graph of u -> J^T u cannot be differentiated.
    """

    def __init__(self, space: Vectors, outputs: Tensor, loss: Any) -> None:
        self.space, self.outputs, self.curved = space, outputs, CurvatureOfLoss(outputs, loss)
        self._dual = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(outputs, space.params, self._dual, create_graph=True, allow_unused=True)
        self._back = {i: g for i, g in enumerate(back) if g is not None}
        problem = dead_end(self._back.values())
        if problem or not all(g.requires_grad for g in self._back.values()):
            raise RuntimeError(problem or "A backward pass of the model is unknown to autograd.")
        self.doubtful = has_functions_of_users([outputs])

    def __call__(self, v: Tensor, norm: float | None = None) -> Tensor:
        along = self.space.tensors(v)
        back, given = list(self._back.values()), [along[i] for i in self._back]
        (tangent,) = torch.autograd.grad(back, self._dual, given, retain_graph=True)
        curved = self.curved(tangent)
        return self.space.flat(
            torch.autograd.grad(self.outputs, self.space.params, curved, retain_graph=True, allow_unused=True)
        )


class CurvatureOfLoss:
    """u to H_L u, with H_L the Hessian of the loss with respect to the outputs.

    Args:
        outputs: The outputs.
        loss: A function of them, or its value with its graph.
    """

    def __init__(self, outputs: Tensor, loss: Any) -> None:
        self._at = outputs
        if isinstance(loss, Callable):  # type: ignore[arg-type]
            self._at = outputs.detach().requires_grad_()
            loss = loss(self._at)
        (slope,) = torch.autograd.grad(loss, self._at, create_graph=True, allow_unused=True)
        if slope is None:
            raise OptionError(
                "With operator='ggn' the loss must be computed from the outputs that the closure returns, as a "
                "function of them or as its value; this one does not depend on them."
            )
        self._slope: Tensor = slope

    def __call__(self, tangent: Tensor) -> Tensor:
        if not self._slope.requires_grad:  # the loss is linear
            return torch.zeros_like(tangent)
        (curved,) = torch.autograd.grad(self._slope, self._at, tangent, retain_graph=True, allow_unused=True)
        return torch.zeros_like(tangent) if curved is None else curved
