"""How an engine runs one batch in one step: its launches, and the numbers between its passes.

What is one number per tensor is kept as a float64 vector where the tensors are, so that on a GPU the host waits for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_optim.engines.launch import to_device
from lightning_optim.engines.step import Batch, Step
from lightning_optim.language.math import FUNCTIONS
from lightning_optim.language.program import look_up
from lightning_optim.language.symbols import Symbol, is_element
from lightning_optim.language.values import By

L = TypeVar("L")  # what is served together
REDUCTIONS: tuple[By, ...] = ("sum", "max")


class Backend(Protocol[L]):
    """What walks over the elements of a batch."""

    def launches(self, batch: Batch) -> list[L]:
        """The local parameters of a batch, by what is served together."""
        ...

    def reduce(self, plan: Plan[L], of: tuple[Symbol, ...], by: By) -> Tensor:
        """What this process contributes to the sums or maxima over the elements of each tensor.

        Args:
            plan: The plan, whose numbers below the level of these reductions are known.
            of: The symbols to sum, or to take the maximum of.
            by: Sum or maximum.

        Returns:
            (params, len(of)) float64, where the tensors are.
        """
        ...

    def write(self, plan: Plan[L], outputs: tuple[str, ...]) -> None:
        """Compute and write the parameter and slots named in `outputs`. All numbers of the plan are known."""
        ...


class Plan(Generic[L]):
    """One batch in one step.

    Args:
        batch: The batch.
        step: The step that it belongs to.
        elements: The number of elements of all tensors of the step.
        backend: What walks over the elements.

    Attributes:
        launches: What is served together.
        numbers: The values of symbols that are no elements: a float; a float64 tensor of shape () for what is one
            number for all tensors; or one of shape (params,), in the order of `batch.params`.
    """

    def __init__(self, batch: Batch, step: Step, elements: float, backend: Backend[L]) -> None:
        self.batch, self.program, self.step, self.elements, self.backend = batch, batch.program, step, elements, backend
        self.device = batch.params[0].param.device
        self.launches = backend.launches(batch)
        self.numbers: dict[Symbol, Any] = batch.program.numbers(batch.h)

    def value(self, x: Any) -> Any:
        """The number behind an argument: a symbol's, or the argument itself."""
        return self.numbers[x] if isinstance(x, Symbol) else x

    def vector(self, x: Any) -> Tensor:
        """A number as a (params,) float64 vector where the tensors are."""
        value, count = self.value(x), len(self.batch.params)
        if isinstance(value, Tensor):
            return value.double().expand(count)
        return torch.full((count,), value, dtype=torch.float64, device=self.device)

    def fill(self, level: int | None = None) -> None:
        """Evaluate the numbers that follow from reductions up to a level, or from all."""
        for symbol in self.program.scalars:
            if symbol not in self.numbers and (level is None or symbol.level <= level):
                self.numbers[symbol] = self._evaluate(symbol)

    def _evaluate(self, symbol: Symbol) -> Any:
        """The value of a symbol whose arguments are known."""
        if symbol.name == "host":  # a tensor: the program knows those that are none
            return look_up(self.batch.h, symbol.args[0])
        if symbol.name == "scalar":
            return self._stored(symbol.args[0])
        if symbol.name == "count":
            return self.elements if symbol.args[0] == "all" else self._elements_of_each()
        args = [self.value(arg) for arg in symbol.args]
        if not any(isinstance(arg, Tensor) for arg in args):
            return FUNCTIONS[symbol.name].number(*args)
        if symbol.name == "where" and not isinstance(args[0], Tensor):
            return args[1] if args[0] else args[2]
        if symbol.name in ("maximum", "minimum", "where", "lerp"):  # torch wants tensors
            args = [arg if isinstance(arg, Tensor) else self._filled(arg) for arg in args]
        return FUNCTIONS[symbol.name].tensor(*args)

    def _filled(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def _stored(self, slot: str) -> Any:
        """The value of a slot that is one number, of the optimizer or of each tensor."""
        if slot in self.step.shared:
            return float(self.step.shared[slot])
        return to_device(torch.stack([param.state[slot] for param in self.batch.params]).double(), self.device)

    def _elements_of_each(self) -> Tensor:
        """The number of elements of each whole tensor, (params,) float64."""
        if "numel" not in self.batch.cache:
            numbers = torch.tensor([param.numel for param in self.batch.params], dtype=torch.float64)
            self.batch.cache["numel"] = to_device(numbers, self.device)
        return self.batch.cache["numel"]  # type: ignore[no-any-return]

    def partials(self, wanted: Sequence[Symbol]) -> list[Tensor]:
        """What this process contributes of each tensor to some reductions of one level, each (params,) float64."""
        if not wanted:
            return []
        self.fill(wanted[0].level - 1)
        found: dict[tuple[Any, By], Tensor] = {}
        for by in REDUCTIONS:
            if of := self.program.summands(wanted[0].level, by):
                found.update(zip(((x, by) for x in of), self.backend.reduce(self, of, by).unbind(1), strict=True))
        keys = [(symbol.args[0], symbol.args[2]) for symbol in wanted]
        return [found[key] if key in found else self.vector(key[0]) for key in keys]

    def process_groups(self, reduction: Symbol) -> list[tuple[Any, ...]]:
        """For each tensor the process groups whose ranks have their parts in a reduction."""
        of_elements = is_element(reduction.args[0])
        return [param.process_groups if of_elements else () for param in self.batch.params]

    def write(self, shared: dict[str, Any]) -> None:
        """The last pass: compute and write the parameter and the slots.

        Args:
            shared: Takes the new values of the slots of the optimizer, which other plans may still read.
        """
        self.fill()
        if self.program.moving:
            self.backend.write(self, self.program.moving)
        for slot, result in self.program.outputs.items():
            if slot in self.program.writes:
                continue
            if slot in self.step.shared:
                number = self.value(result)
                shared[slot] = number[-1] if isinstance(number, Tensor) and number.dim() else number
                continue
            for param, own in zip(self.batch.params, self.vector(result).tolist(), strict=True):
                (param.param if slot == "p" else param.state[slot]).fill_(own)
