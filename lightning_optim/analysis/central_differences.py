"""Products with the Hessian and with the generalised Gauss-Newton matrix by central differences of first derivatives.

What is computed at two points is a gradient or the outputs, under every strategy and with kernels that cannot be
differentiated twice. The parameters are moved in place, and are put back bit for bit from a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from lightning_optim.analysis.closures import Closure
from lightning_optim.analysis.double_backward import CurvatureOfLoss
from lightning_optim.analysis.gradients import Gradients
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.distributed.placement import local

T = TypeVar("T")


class Shift:
    """Moves the parameters of a space along a vector, and back.

    The step h is (eps max(1, |theta|))^(1/3), with eps the precision of the coarsest parameter: rounding of
    theta +- h v is an error of eps |theta| / h in the product, and the third derivative along v one of h^2, here
    equally large. For |theta| = 10 a step is 1.3e-5 in float64 and 1e-2 in float32. Gradients that are computed in
    half precision, as under autocast, are means of many numbers that were rounded: a sixteenth of their precision.

    Args:
        space: The space.
        gradients: Knows what must be gathered again once parameters have moved.
        computed: The precision in which gradients are computed.
    """

    def __init__(self, space: Vectors, gradients: Gradients, computed: float = 0.0) -> None:
        self.space, self.gradients = space, gradients
        self._kept = [local(p).detach().clone() for p in space.params]
        eps = max(computed / 16, *(torch.finfo(p.dtype).eps for p in space.params))
        self.step = (eps * max(1.0, space.norm(space.flat(self._kept)))) ** (1 / 3)

    @contextmanager
    def along(self, v: Tensor, step: float) -> Iterator[None]:
        """Inside, the parameters are theta + step v."""
        try:
            for p, kept, part in zip(self.space.params, self._kept, self.space.shards(v), strict=True):
                local(p.data).copy_(kept).add_(part, alpha=step)  # `data`: graphs of others still see what they saved
            self.gradients.forget()
            yield
        finally:
            for p, kept in zip(self.space.params, self._kept, strict=True):
                local(p.data).copy_(kept)
            self.gradients.forget()

    def difference(self, of: Callable[[], Tensor], v: Tensor, norm: float | None, factor: float = 1.0) -> Tensor:
        """The derivative along v of something that is computed at the parameters.

        Args:
            of: Computes it.
            v: A vector.
            norm: Its norm, where it is known.
            factor: By how much the step is longer than it would be.
        """
        norm = self.space.norm(v) if norm is None else norm
        step = factor * self.step / (norm or 1.0)
        with self.along(v, step):
            found = of()
        with self.along(v, -step):
            return found.sub_(of()).div_(2 * step)


class Hessian:
    """v to H v, from two gradients.

    Args:
        closure: Returns the loss of this rank, with its graph.
        gradients: Computes gradients.
        shift: Moves the parameters.
    """

    def __init__(self, closure: Closure, gradients: Gradients, shift: Shift) -> None:
        self.closure, self.gradients, self.shift = closure, gradients, shift

    def __call__(self, v: Tensor, norm: float | None, factor: float = 1.0) -> Tensor:
        return self.shift.difference(lambda: self.gradients.of(self.closure()), v, norm, factor)


class GaussNewton:
    """v to J^T H_L J v: J v from two forward passes, J^T by a backward pass.

    Args:
        closure: Returns the outputs of the model with their graph, and the loss of the outputs.
        gradients: Computes gradients.
        shift: Moves the parameters.
    """

    def __init__(self, closure: Closure, gradients: Gradients, shift: Shift) -> None:
        self.closure, self.gradients, self.shift = closure, gradients, shift

    def __call__(self, v: Tensor, norm: float | None, factor: float = 1.0) -> Tensor:
        with torch.no_grad():
            tangent = self.shift.difference(lambda: self.closure()[0].clone(), v, norm, factor)
        outputs, loss = self.closure()
        curved = CurvatureOfLoss(outputs, loss)(tangent)
        return self.gradients.of((outputs * curved).sum())
