"""The plan of a batch for one step: its launches, and the numbers that its passes need.

Numbers of tensors are stored as a float64 vector on the device of the tensors, so that the host never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_optim.engines.launch import to_device
from lightning_optim.engines.matrices import Call
from lightning_optim.engines.statistics import Mean, Statistics
from lightning_optim.engines.step import Batch, Step
from lightning_optim.language.math import FUNCTIONS
from lightning_optim.language.program import look_up
from lightning_optim.language.symbols import Symbol, is_element, is_statistic
from lightning_optim.language.values import By

L = TypeVar("L")  # a launch: the local parameters that are served together
REDUCTIONS: tuple[By, ...] = ("sum", "max")


class Backend(Protocol[L]):
    """The part of an engine that walks over the elements of a batch."""

    def launches(self, batch: Batch) -> list[L]:
        """The launches that serve a batch."""
        ...

    def reduce(self, plan: Plan[L], of: tuple[Symbol, ...], by: By) -> Tensor:
        """Sums or maxima over the local elements of each tensor.

        Args:
            plan: The plan. Its numbers below the level of these reductions are filled in.
            of: The symbols to sum, or to take the maximum of.
            by: "sum" or "max".

        Returns:
            A float64 tensor of shape (params, len(of)) on the device of the local parameters.
        """
        ...

    def store(self, plan: Plan[L], buffers: tuple[str, ...]) -> None:
        """Compute the arguments of functions of whole matrices, and write them into buffers."""
        ...

    def add_up(self, plan: Plan[L], of: tuple[Symbol, ...]) -> list[list[Tensor]]:
        """The sums of means along axes, over the local elements.

        Args:
            plan: The plan. Its numbers below the level of these means are filled in.
            of: The means. Their arguments have one value per element.

        Returns:
            For each mean the float64 sums of each group, stacked as `plan.statistics` stacks them.
        """
        ...

    def write(self, plan: Plan[L], outputs: tuple[str, ...]) -> None:
        """Compute and write the parameter and slots named in `outputs`. All numbers of the plan are filled in."""
        ...


class Plan(Generic[L]):
    """The plan of one batch for one step.

    Args:
        batch: The batch.
        step: The step that it belongs to.
        elements: The number of elements of all tensors of the step.
        backend: The part of the engine that walks over the elements.

    Attributes:
        launches: The launches that serve the batch.
        on_device: Whether the host must not read numbers, for which it would wait.
        numbers: The values of the symbols that are not per element: a float, a float64 tensor of shape () for a number
            of all tensors, or one of shape (params,), in the order of `batch.params`, for a number of each tensor.
        statistics: The values of the symbols with one number per row or column.
    """

    def __init__(self, batch: Batch, step: Step, elements: float, backend: Backend[L]) -> None:
        self.batch, self.program, self.step, self.elements, self.backend = batch, batch.program, step, elements, backend
        self.device = batch.params[0].param.device
        self.on_device = self.device.type != "cpu" or batch.program.step_counter is not None
        self.launches = backend.launches(batch)
        self.numbers: dict[Symbol, Any] = batch.program.numbers(batch.h)
        self.statistics = Statistics(batch, self.value)

    def value(self, x: Any) -> Any:
        """The number of a symbol, or the argument itself where it is not a symbol."""
        return self.numbers[x] if isinstance(x, Symbol) else x

    def vector(self, x: Any) -> Tensor:
        """A number as a float64 vector of shape (params,) on the device of the tensors."""
        value, count = self.value(x), len(self.batch.params)
        if isinstance(value, Tensor):
            return value.double().expand(count)
        return torch.full((count,), value, dtype=torch.float64, device=self.device)

    def fill(self, level: int | None = None) -> None:
        """Evaluate the numbers and statistics that follow from cuts up to `level`, or from all of them."""
        for symbol in self.program.scalars:
            if symbol not in self.numbers and (level is None or symbol.level <= level):
                self.numbers[symbol] = self._evaluate(symbol)
        for symbol in self.program.statistics:
            if symbol not in self.statistics.values and (level is None or symbol.level <= level):
                self.statistics.evaluate(symbol)

    def _evaluate(self, symbol: Symbol) -> Any:
        """The value of a symbol whose arguments have values."""
        if symbol.name == "host":  # a tensor; `Program.numbers` has evaluated those that are not
            return look_up(self.batch.h, symbol.args[0]).to(self.device)
        if symbol.name == "scalar":
            return self._stored(symbol.args[0])
        if symbol.name == "count":
            return self.elements if symbol.args[0] == "all" else self._elements_of_each()
        args = [self.value(arg) for arg in symbol.args]
        if not any(isinstance(arg, Tensor) for arg in args):
            return FUNCTIONS[symbol.name].number(*args)
        if symbol.name == "where" and not isinstance(args[0], Tensor):
            return args[1] if args[0] else args[2]
        if symbol.name in ("maximum", "minimum", "where", "lerp"):  # torch takes only tensors
            args = [arg if isinstance(arg, Tensor) else self._filled(arg) for arg in args]
        return FUNCTIONS[symbol.name].tensor(*args)

    def _filled(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def _stored(self, slot: str) -> Any:
        """The value of a slot with one number, of the optimizer or of each tensor."""
        if slot in self.step.shared:
            shared = self.step.shared[slot]
            stays = self.on_device and shared.device.type == self.device.type
            return shared.to(self.device, torch.float64, copy=True) if stays else float(shared)
        stacked = torch.stack([param.state[slot] for param in self.batch.params]).double()
        return stacked if stacked.device == self.device else to_device(stacked, self.device)

    def _elements_of_each(self) -> Tensor:
        """The number of elements of each whole tensor, (params,) float64."""
        if "numel" not in self.batch.cache:
            numbers = torch.tensor([param.numel for param in self.batch.params], dtype=torch.float64, device="cpu")
            self.batch.cache["numel"] = to_device(numbers, self.device)
        return self.batch.cache["numel"]  # type: ignore[no-any-return]

    def partials(self, wanted: Sequence[Symbol]) -> list[Tensor]:
        """Some reductions of one level over the local elements of each tensor, each (params,) float64."""
        if not wanted:
            return []
        self.fill(wanted[0].level - 1)
        found: dict[tuple[Any, By], Tensor] = {}
        for by in REDUCTIONS:
            if of := self.program.summands(wanted[0].level, by):
                found.update(zip(((x, by) for x in of), self.backend.reduce(self, of, by).unbind(1), strict=True))
        keys = [(symbol.args[0], symbol.args[2]) for symbol in wanted]
        return [found[key] if key in found else self.vector(key[0]) for key in keys]

    def calls(self, level: int) -> list[Call]:
        """The functions of whole matrices of a level, whose arguments a pass computes into buffers."""
        buffers = self.program.arguments(level)
        if not buffers:
            return []
        self.fill(level - 1)
        for param in self.batch.params:
            for name in buffers:
                param.make_buffer(name)
        self.backend.store(self, buffers)
        found = []
        for symbol, result in self.program.results.items():
            if symbol.level == level:
                function = symbol.args[0]
                own = [name for name in buffers if name.partition("_")[0] == result]
                vectors = [self._numbers(number) for number in symbol.args[1 + len(own) :]]
                for i, param in enumerate(self.batch.params):
                    values = tuple(param.buffers[name] if name == result else param.buffers.pop(name) for name in own)
                    found.append(Call(param, function, values, tuple(numbers[i] for numbers in vectors)))
        return found

    def _numbers(self, x: Any) -> list[float]:
        """A number for each tensor, on the host."""
        value = self.value(x)
        return self.vector(x).tolist() if isinstance(value, Tensor) else [float(value)] * len(self.batch.params)

    def means(self, level: int) -> list[Mean]:
        """The means of a level along axes, of each group of tensors, before they are divided."""
        wanted, of = self.program.means(level), self.program.averaged(level)
        if not wanted:
            return []
        self.fill(level - 1)
        sums = dict(zip(of, self.backend.add_up(self, of), strict=True)) if of else {}
        return [mean for symbol in wanted for mean in self.statistics.means(symbol, sums.get(symbol))]

    def process_groups(self, reduction: Symbol) -> list[tuple[Any, ...]]:
        """For each tensor the process groups over whose ranks a reduction runs."""
        of_elements = is_element(reduction.args[0])
        return [param.process_groups if of_elements else () for param in self.batch.params]

    def write(self, shared: dict[str, Any]) -> None:
        """Run the last pass, which computes and writes the parameter and the slots.

        Args:
            shared: Receives the new values of the slots of the optimizer. Other plans may still read the old ones.
        """
        self.fill()
        if self.program.moving:
            self.backend.write(self, self.program.moving)
        if self.program.of_matrices:
            for param in self.batch.params:
                param.write_slots_of_matrices()
            self.step.written += self.batch.params if not self.program.moving else ()
        for slot, result in self.program.outputs.items():
            if slot in self.program.writes or result in self.program.of_matrices:
                continue
            if is_statistic(result):
                self.statistics.write(slot, result)
                continue
            if slot in self.step.shared:
                number = self.value(result)
                if any(param.numel for param in self.step.params):
                    shared[slot] = number[-1] if isinstance(number, Tensor) and number.dim() else number
                continue
            self._store(slot, self.vector(result))

    def _store(self, slot: str, numbers: Tensor) -> None:
        """Write a number of each tensor. On a device the host does not look at it."""
        held = [i for i, param in enumerate(self.batch.params) if param.numel]  # the mean of no elements is no number
        params = map(self.batch.params.__getitem__, held)
        targets = [param.param if slot == "p" else param.state[slot] for param in params]
        if self.on_device:
            of_each = numbers.unbind()
            torch._foreach_copy_(targets, [of_each[i].expand_as(x) for i, x in zip(held, targets, strict=True)])
            return
        found = numbers.tolist()
        for i, target in zip(held, targets, strict=True):
            target.fill_(found[i])
