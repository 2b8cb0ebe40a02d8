"""Products of a matrix of second derivatives with vectors: what is asked of the closure, and which way is taken."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_optim.analysis import central_differences, double_backward
from lightning_optim.analysis.closures import (
    Closure,
    check_finite,
    checked,
    generators_kept,
    problem_of_loss,
    problem_of_outputs,
    problem_of_repetition,
)
from lightning_optim.analysis.gradients import USED_UP, Gradients
from lightning_optim.analysis.graphs import precision
from lightning_optim.analysis.ranks import Ranks
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.errors import OptionError, check, check_choice, first_line

Matrix = Literal["hessian", "ggn"]
Way = Literal["autograd", "differences"]
NO_PATH = (
    "No gradient path leads from the loss to any of the params. Are they those of the model that the closure calls? "
    "Checkpointing hides it with use_reentrant=True; use False."
)
Times = Callable[..., Tensor]


class Evaluated(NamedTuple):
    """What a closure returned: the loss, and for the Gauss-Newton matrix the outputs and the loss of outputs."""

    loss: Tensor
    outputs: Any = None
    loss_of: Any = None


class Multiplier(Protocol):
    """A symmetric matrix of which products are known: `Products`, or something made of them."""

    @property
    def space(self) -> Vectors:
        """The space of vectors."""
        ...

    @property
    def way(self) -> Way:
        """How products are made, once there was one."""
        ...

    def __call__(self, v: Tensor, norm: float | None = None, factor: float = 1.0) -> Tensor:
        """The product with a vector; for differences its norm, and by how much their step is longer."""
        ...


class Products:
    """v to A v, with A the Hessian or the generalised Gauss-Newton matrix of a loss at the parameters.

    A loss that is spread over ranks is the mean over them, and so is A. A product sends one message.

    Attributes:
        space: The space of vectors.
        loss: The loss.
        gradient: Its gradient, a vector.
        way: How products are made: "autograd", exact, or "differences".
        count: The number of products so far.
    """

    def __init__(
        self,
        owner: str,
        closure: Closure,
        params: Iterable[Tensor],
        matrix: Matrix,
        way: Way | None,
        stack: ExitStack,
    ) -> None:
        check(owner, "closure", closure, callable(closure), "a function without arguments that returns the loss")
        check_choice(owner, "operator", matrix, ["hessian", "ggn"])
        check_choice(owner, "products", way, ["autograd", "differences", None])
        self.owner, self.matrix, self.count = owner, matrix, 0
        self.space = Vectors(checked(owner, params))
        self.ranks, self.gradients = Ranks(self.space.params), Gradients(self.space)
        stack.enter_context(self.ranks.unnoticed())
        self._closure, self._asked = closure, way
        first = self._evaluate()
        value = first.loss.detach().double().reshape(1).cpu()
        self._precision = precision([first.loss])
        self.gradient = self.mean(self.gradients.of(first.loss))
        self.ranks.refuse("" if self.gradients.found else f"{owner}: {NO_PATH}")
        with torch.set_grad_enabled(not self.gradients.modules):  # no backward pass follows under FSDP
            second = self._evaluate(graph=not self.gradients.modules)
        self.gradients.forget()
        problem = problem_of_repetition(float(value), float(second.loss.detach()), second.loss.dtype)
        if second.loss is first.loss and not first.loss.is_leaf:
            problem = USED_UP
        self.ranks.refuse(problem and f"{owner}: {problem}")
        self.loss = float(self.ranks.mean(value))
        self._times = self._choose(second)

    def __call__(self, v: Tensor, norm: float | None = None, factor: float = 1.0) -> Tensor:
        """The product with a vector.

        Args:
            v: (local,) of `space`.
            norm: The norm of v, where it is known; differences ask for it.
            factor: By how much the step of differences is longer than it would be.

        Returns:
            A new vector. Where it is not finite, `space.dots` of it is NaN on every rank; see `finite`.
        """
        self.count += 1
        with torch.inference_mode(False), torch.enable_grad():
            if factor != 1.0 and self.way == "differences":
                return self.mean(self._times(v, norm, factor))
            return self.mean(self._times(v, norm))

    def mean(self, v: Tensor) -> Tensor:
        """The mean over ranks of vectors that each rank computed from its part of the batch, in place.

        FSDP has averaged its shards already.
        """
        replicated = v[self.space.replicated]
        if len(replicated):
            self.ranks.mean(replicated)
        return v

    def finite(self, value: float) -> float:
        """A number that depends on products, if it is finite.

        Raises:
            OptionError: where it is NaN or infinite.
        """
        check_finite(self.owner, value)
        return value

    # ---------------------------------------------------------------- the closure

    def _evaluate(self, graph: bool = True) -> Evaluated:
        """Call the closure. What is wrong with its result on one rank is raised on all."""
        found: Any = None
        problem = ""
        try:
            found = self._closure()
        except Exception as error:
            why = first_line(error)
            own = isinstance(error, OptionError)
            problem = (
                why.removeprefix(f"{self.owner}: ") if own else f"The closure raised {type(error).__name__}: {why}"
            )
            if not self.ranks.process_groups:
                raise
        if not problem and self.matrix == "ggn":
            problem = problem_of_outputs(found, bool(self.gradients.modules))
        self.ranks.refuse(problem and f"{self.owner}: {problem}")
        evaluated = Evaluated(found)
        if self.matrix == "ggn":
            outputs, loss_of = found
            loss: Any = loss_of(outputs) if callable(loss_of) else loss_of
            evaluated = Evaluated(loss, outputs, loss_of)
        problem = problem_of_loss(evaluated.loss, graph)
        self.ranks.refuse(problem and f"{self.owner}: {problem}")
        return evaluated

    # ---------------------------------------------------------------- the way

    def _choose(self, evaluated: Evaluated) -> Times:
        if self._asked == "differences":
            return self._by_differences()
        if self.gradients.modules:
            if self._asked == "autograd":
                raise OptionError(
                    f"{self.owner}: FSDP does not differentiate twice. Let products be 'differences', or None."
                )
            return self._instead("FSDP does not differentiate twice.")
        self.way: Way = "autograd"
        return functools.partial(self._first, evaluated)

    def _first(self, evaluated: Evaluated, v: Tensor, norm: float | None) -> Tensor:
        """The first product by autograd, which tells whether there is a second backward pass."""
        problem, found = "", v
        try:
            exact: Any = (
                double_backward.Hessian(self.space, evaluated.loss)
                if self.matrix == "hessian"
                else double_backward.GaussNewton(self.space, evaluated.outputs, evaluated.loss_of)
            )
            found = exact(v, norm)
            self._times = exact
            if exact.doubtful and self._asked is None:
                problem = self._difference(found, v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            problem = f"A second backward pass failed: {first_line(error)}"
        if not self.ranks.any(bool(problem)):
            return found
        problem = problem or "A second backward pass failed on another rank."
        if self._asked == "autograd":
            raise OptionError(f"{self.owner}: {problem} Let products be 'differences', or None.")
        self._times = self._instead(problem)
        return self._times(v, norm)

    def _difference(self, found: Tensor, v: Tensor) -> str:
        """What is wrong with a product that is far from that by differences. Of kernels it may lack a term."""
        norm = float(v.double().norm())
        shift = central_differences.Shift(self.space, self.gradients, self._precision)
        other = self._differences(shift)(v, norm)
        eps = torch.finfo(self.space.dtype).eps
        noise = 100 * eps * float(self.gradient.double().norm()) * norm / shift.step
        size, apart = float(other.double().norm()), float((other - found).double().norm())
        if not apart > max(1e-3, 100 * shift.step**2) * size + noise:
            return ""
        return (
            f"A second backward pass differs by {100 * apart / max(size, 1e-300):.2g} % from central differences: a "
            "backward pass of the model is not recorded by autograd."
        )

    def _instead(self, why: str) -> Times:
        warnings.warn(f"{self.owner}: {why} Products are central differences of gradients instead.", stacklevel=2)
        return self._by_differences()

    def _by_differences(self) -> Times:
        self.way = "differences"
        return self._differences(central_differences.Shift(self.space, self.gradients, self._precision))

    def _differences(self, shift: central_differences.Shift) -> Times:
        kind = central_differences.Hessian if self.matrix == "hessian" else central_differences.GaussNewton
        return kind(self._closure, self.gradients, shift)


@contextmanager
def products_of(
    owner: str,
    closure: Closure,
    params: Iterable[Tensor],
    operator: Matrix = "hessian",
    products: Way | None = None,
) -> Iterator[Products]:
    """Products with a matrix of second derivatives. Afterwards gradients and random generators are what they were.

    Args:
        owner: The function that the user called, for messages.
        closure: Returns the mean loss of fixed batches as a scalar tensor with its graph; for "ggn" a pair of the
            outputs and a function that computes the loss from outputs. On several ranks each has its part of the batch.
        params: The parameters.
        operator: The Hessian, or the generalised Gauss-Newton matrix.
        products: "autograd" is exact and differentiates twice; "differences" needs one derivative. None takes autograd
            where that can be, and says so where it cannot.

    Raises:
        OptionError: if parameters, the closure or its loss cannot serve; on all ranks.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> with products_of("example", lambda: (x**3).sum(), [x]) as times:
        ...     times(torch.ones(2))
        tensor([ 6., 12.])
    """
    with generators_kept(), torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        yield Products(owner, closure, params, operator, products, stack)
