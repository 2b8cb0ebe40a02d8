"""What the compiled and the Triton engine share: printed kernels, cached by program and signature, and launches."""

from __future__ import annotations

import abc
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_optim.engines.launch import Launch, launches_of
from lightning_optim.engines.plan import REDUCTIONS, Plan
from lightning_optim.engines.signature import Signature
from lightning_optim.engines.stacks import Stacks
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol
from lightning_optim.language.values import By
from lightning_optim.storage.format import Format


@dataclass(frozen=True)
class Kernel:
    """The printed code of one pass.

    Attributes:
        name: The name of the function that is launched.
        text: The source code.
        arguments: The types of the arguments that follow the address table, by name.
        numbers: The symbols whose values are passed as float arguments, by name of the argument.
        integers: The symbols whose values are passed as integer arguments, by name of the argument.
        values: The symbols with one number per tensor, in the order of the columns of the argument `values`.
        sums: The number of results that it stores per tile; 0 for a pass that writes.
        by: "sum" or "max" for a reduction, "mean" for sums towards statistics; empty for a pass that writes.
        statistics: The statistics that it reads, by name of the argument.
        formats: The formats whose functions it calls.
    """

    name: str
    text: str
    arguments: dict[str, str]
    numbers: dict[str, Symbol]
    integers: dict[str, Symbol]
    values: tuple[Symbol, ...]
    sums: int = 0
    by: str = ""
    statistics: dict[str, Symbol] = field(default_factory=dict)
    formats: tuple[Format, ...] = field(default=())


# Threads print, compile and load one after another: what they share is cached, and refers to memory by its address.
_first_use = threading.Lock()


def _renew() -> None:
    """A child of a fork gets a lock of its own: a thread that it does not have may hold the old one."""
    global _first_use
    _first_use = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
# Weak keys: a program refers to its optimizer, and so to the model. A cache must not keep these alive.
_kernels: WeakKeyDictionary[Program, dict[Any, tuple[Kernel, Any]]] = WeakKeyDictionary()


class KernelBackend(abc.ABC):
    """Runs plans with one kernel call per launch.

    Attributes:
        name: The name of the engine.
        served: The dtypes that kernels read and write.
        by_alignment: Whether kernels depend on which addresses are multiples of 16.
        tile: The number of elements that one instance of a kernel serves.
    """

    name: str
    served: Sequence[torch.dtype]
    by_alignment: bool
    tile: int

    @staticmethod
    @abc.abstractmethod
    def print(program: Program, signature: Signature, outputs: Sequence[str]) -> Kernel:
        """Print the pass that computes and stores the parameter and slots, or the buffers, named in `outputs`."""

    @staticmethod
    @abc.abstractmethod
    def print_reduction(program: Program, signature: Signature, of: Sequence[Symbol], by: By) -> Kernel:
        """Print a pass that stores, for each tile, the sum or the maximum of each of the symbols `of`."""

    @staticmethod
    @abc.abstractmethod
    def print_means(program: Program, signature: Signature, of: Sequence[Symbol]) -> Kernel:
        """Print a pass from which `add_up` gets the sums of the means `of`."""

    @abc.abstractmethod
    def add_up(self, plan: Plan[Launch], of: tuple[Symbol, ...]) -> list[list[Tensor]]:
        """The sums of means along axes: see `Backend`."""

    @abc.abstractmethod
    def build(self, kernel: Kernel) -> Any:
        """Compile a kernel into what `call` runs.

        Raises:
            EngineError: where that fails.
        """

    @abc.abstractmethod
    def call(self, kernel: Kernel, built: Any, launch: Launch, given: dict[str, Any]) -> None:
        """Run a kernel over all tiles, and set `launch.ran` as soon as it may have written something.

        Args:
            kernel: The kernel.
            built: What `build` returned for it.
            launch: The local parameters.
            given: Its arguments by name: numbers, and where it takes them `values` of shape
                (params, len(kernel.values)) in float64, the step counter `t`, and `partials` of shape (tiles, sums) in
                float64, into which it stores results.
        """

    @abc.abstractmethod
    def combine(self, kernel: Kernel, partials: Tensor, launch: Launch) -> Tensor:
        """Combine the results of the tiles of each tensor, always in the same order.

        Args:
            kernel: The kernel.
            partials: Its results, (tiles, sums) float64.
            launch: The local parameters.

        Returns:
            The results of each tensor, (params, sums) float64.
        """

    # ------------------------------------------------------------------ as a backend of plans

    def launches(self, batch: Batch) -> list[Launch]:
        """The launches of a batch with all their kernels: a step writes nothing before it has those of every batch.

        Raises:
            EngineError: where a kernel cannot be had.
        """
        program = batch.program
        names = (*program.operands, "index") if program.normals else program.operands
        layouts = Stacks.of(batch).numbers if program.axes else ()
        buffers = tuple(program.buffers)
        launches = launches_of(batch, names, buffers, self.served, self.by_alignment, self.tile, layouts)
        for launch in launches:
            if program not in launch.kernels:
                launch.kernels[program] = self._kernels(program, launch.signature)
        return launches

    def prepare(self, step: Step) -> None:
        """Have all kernels of a step."""
        for batch in step.batches:
            self.launches(batch)

    def reduce(self, plan: Plan[Launch], of: tuple[Symbol, ...], by: By) -> Tensor:
        results = [self._reduce(plan, launch, of, by) for launch in plan.launches]
        if len(results) == 1:
            return results[0]
        of_batch = torch.empty(len(plan.batch.params), len(of), dtype=torch.float64, device=plan.device)
        for launch, result in zip(plan.launches, results, strict=True):
            of_batch.index_copy_(0, launch.positions_on_device, result)
        return of_batch

    def _reduce(self, plan: Plan[Launch], launch: Launch, of: tuple[Symbol, ...], by: By) -> Tensor:
        """The sums or maxima of the tensors of one launch, (params, len(of)) float64."""
        kernel, built = launch.kernels[plan.program][of, by]
        partials = torch.empty(launch.count, len(of), dtype=torch.float64, device=plan.device)
        if launch.count:
            self.call(kernel, built, launch, {**arguments_of(kernel, plan, launch), "partials": partials})
        return self.combine(kernel, partials, launch)

    def store(self, plan: Plan[Launch], buffers: tuple[str, ...]) -> None:
        for launch in plan.launches:
            launch.point_at_buffers(buffers)
            kernel, built = launch.kernels[plan.program][buffers]
            if launch.count:
                self.call(kernel, built, launch, arguments_of(kernel, plan, launch))

    def write(self, plan: Plan[Launch], outputs: tuple[str, ...]) -> None:
        for launch in plan.launches:
            kernel, built = launch.kernels[plan.program][outputs]
            launch.ran = False
            try:
                if launch.count:
                    self.call(kernel, built, launch, arguments_of(kernel, plan, launch))
                launch.copy_back(outputs)
            except BaseException:
                plan.step.written += launch.params if launch.ran else []
                raise
            plan.step.written += launch.params

    # ------------------------------------------------------------------ kernels

    def _kernels(self, program: Program, signature: Signature) -> dict[Any, tuple[Kernel, Any]]:
        """The kernels of all passes, in the order in which they run, by what they compute."""
        found: dict[Any, tuple[Kernel, Any]] = {}
        for level in range(1, program.levels + 1):
            for by in REDUCTIONS:
                if of := program.summands(level, by):
                    found[of, by] = self.reduction(program, signature, of, by)
            if buffers := program.arguments(level):
                found[buffers] = self.kernel(program, signature, buffers)
            if of := program.averaged(level):
                found[of, "mean"] = self.reduction(program, signature, of, "mean")
        if program.moving:
            found[program.moving] = self.kernel(program, signature, program.moving)
        return found

    def kernel(self, program: Program, signature: Signature, outputs: tuple[str, ...]) -> tuple[Kernel, Any]:
        """The kernel of a pass that stores outputs or buffers, printed and built at its first use."""
        cache = _kernels.setdefault(program, {})
        key = (self.name, outputs, signature)
        if key not in cache:
            self._add(cache, key, self.print, program, signature, outputs)
        return cache[key]

    def reduction(
        self, program: Program, signature: Signature, of: tuple[Symbol, ...], by: By | Literal["mean"]
    ) -> tuple[Kernel, Any]:
        """The kernel of a pass of sums, maxima or means along axes, printed and built at its first use."""
        cache = _kernels.setdefault(program, {})
        key = (self.name, of, by, signature)
        if key not in cache:
            if by == "mean":
                self._add(cache, key, self.print_means, program, signature, of)
            else:
                self._add(cache, key, self.print_reduction, program, signature, of, by)
        return cache[key]

    def _add(self, cache: dict[Any, tuple[Kernel, Any]], key: Any, printer: Callable[..., Kernel], *args: Any) -> None:
        with _first_use:
            printed = printer(*args)
            cache[key] = printed, self.build(printed)

    def kernels(self, program: Program, params: Sequence[LocalParameter]) -> list[Kernel]:
        """The kernels that serve a program on local parameters like these, in the order of their launches."""
        launches = self.launches(Batch.of(program, {}, params=params))
        of_signatures = {launch.signature: launch.kernels[program] for launch in launches}
        return [kernel for found in of_signatures.values() for kernel, _ in found.values()]


def arguments_of(kernel: Kernel, plan: Plan[Launch], launch: Launch) -> dict[str, Any]:
    """The arguments of a kernel that hold numbers and statistics, by name."""
    found: dict[str, Any] = {word: plan.numbers[symbol] for word, symbol in kernel.numbers.items()}
    for word, symbol in kernel.integers.items():
        found[word] = int(plan.numbers[symbol])
    if kernel.values:
        values = torch.stack([plan.vector(symbol) for symbol in kernel.values], 1)
        found["values"] = values if len(plan.launches) == 1 else values[launch.positions_on_device]
    for word, symbol in kernel.statistics.items():
        found[word] = plan.statistics.flat(symbol, launch.params[0].compute_dtype)
    if "t" in kernel.arguments:
        found["t"] = plan.batch.t
    return found
