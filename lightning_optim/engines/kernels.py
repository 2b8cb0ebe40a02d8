"""What the engines with kernels share: printed kernels, kept by program and signature, and their launches."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_optim.engines.launch import Launch, launches_of
from lightning_optim.engines.plan import REDUCTIONS, Plan
from lightning_optim.engines.signature import Signature
from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol
from lightning_optim.language.values import By
from lightning_optim.storage.format import Format


@dataclass(frozen=True)
class Kernel:
    """The printed code of one pass.

    Attributes:
        name: The name of the function to be launched.
        text: The code.
        arguments: Names of the arguments after the table, with their types.
        numbers: The symbols behind arguments that are numbers, by name.
        integers: The symbols behind arguments that are whole numbers, by name.
        values: The symbols that are one number per tensor, in the order of the columns of `values`.
        sums: How many results it stores per tile; 0 for a pass that writes.
        by: Whether these are sums or maxima.
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
    formats: tuple[Format, ...] = field(default=())


# A program knows its optimizer and so the model: it must not outlive them here.
_kernels: WeakKeyDictionary[Program, dict[Any, tuple[Kernel, Any]]] = WeakKeyDictionary()


class KernelBackend(abc.ABC):
    """Runs plans with one kernel call per launch.

    Attributes:
        name: The name of the engine.
        served: The dtypes that kernels read and write.
        by_alignment: Whether local parameters at odd addresses are launched apart.
        tile: How many elements an instance of a kernel serves.
    """

    name: str
    served: Sequence[torch.dtype]
    by_alignment: bool
    tile: int

    @abc.abstractmethod
    def print(self, program: Program, signature: Signature, outputs: Sequence[str]) -> Kernel:
        """The pass that computes and stores the parameter and slots named in `outputs`."""

    @abc.abstractmethod
    def print_reduction(self, program: Program, signature: Signature, of: Sequence[Symbol], by: By) -> Kernel:
        """A pass that stores, for each tile, the sum or the maximum of each of some symbols."""

    @abc.abstractmethod
    def build(self, kernel: Kernel) -> Any:
        """What can be launched."""

    @abc.abstractmethod
    def call(self, kernel: Kernel, built: Any, launch: Launch, given: dict[str, Any]) -> None:
        """Run a kernel over all tiles.

        Args:
            kernel: The kernel.
            built: What `build` made of it.
            launch: The local parameters.
            given: Its arguments by name: numbers, and where it takes them `values`, (params, len(kernel.values))
                float64, `t`, and `partials`, (tiles, sums) float64.
        """

    @abc.abstractmethod
    def combine(self, kernel: Kernel, partials: Tensor, launch: Launch) -> Tensor:
        """The results of each tensor, (params, sums), from those of its tiles, always in the same order."""

    # ------------------------------------------------------------------ as a backend of plans

    def launches(self, batch: Batch) -> list[Launch]:
        program = batch.program
        names = (*program.operands, "index") if program.normals else program.operands
        return launches_of(batch, names, self.served, self.by_alignment, self.tile)

    def reduce(self, plan: Plan[Launch], of: tuple[Symbol, ...], by: By) -> Tensor:
        parts = [self._reduce(plan, launch, of, by) for launch in plan.launches]
        if len(parts) == 1:
            return parts[0]
        found = torch.empty(len(plan.batch.params), len(of), dtype=torch.float64, device=plan.device)
        for launch, part in zip(plan.launches, parts, strict=True):
            found.index_copy_(0, launch.where, part)
        return found

    def _reduce(self, plan: Plan[Launch], launch: Launch, of: tuple[Symbol, ...], by: By) -> Tensor:
        """The sums of the tensors of one launch, (params, len(of)) float64."""
        kernel, built = self.reduction(plan.program, launch.signature, of, by)
        partials = torch.empty(launch.count, len(of), dtype=torch.float64, device=plan.device)
        if launch.count:
            self.call(kernel, built, launch, {**_given(kernel, plan, launch), "partials": partials})
        return self.combine(kernel, partials, launch)

    def write(self, plan: Plan[Launch], outputs: tuple[str, ...]) -> None:
        for launch in plan.launches:
            kernel, built = self.kernel(plan.program, launch.signature, outputs)
            if launch.count:
                self.call(kernel, built, launch, _given(kernel, plan, launch))
            launch.copy_back(outputs)

    # ------------------------------------------------------------------ kernels

    def kernel(self, program: Program, signature: Signature, outputs: tuple[str, ...]) -> tuple[Kernel, Any]:
        """The last pass, printed and built when it is asked for the first time."""
        known = _kernels.setdefault(program, {})
        key = (self.name, outputs, signature)
        if key not in known:
            printed = self.print(program, signature, outputs)
            known[key] = printed, self.build(printed)
        return known[key]

    def reduction(self, program: Program, signature: Signature, of: tuple[Symbol, ...], by: By) -> tuple[Kernel, Any]:
        """A pass of sums or maxima, printed and built when it is asked for the first time."""
        known = _kernels.setdefault(program, {})
        key = (self.name, of, by, signature)
        if key not in known:
            printed = self.print_reduction(program, signature, of, by)
            known[key] = printed, self.build(printed)
        return known[key]

    def kernels(self, program: Program, params: Sequence[LocalParameter]) -> list[Kernel]:
        """The kernels that serve a program on local parameters like these, in the order of their launches."""
        found = []
        launches = self.launches(Batch.of(program, {}, params=params))
        for signature in dict.fromkeys(launch.signature for launch in launches):
            for level in range(1, program.levels + 1):
                sums = [(of, by) for by in REDUCTIONS if (of := program.summands(level, by))]
                found += [self.reduction(program, signature, of, by)[0] for of, by in sums]
            if program.moving:
                found.append(self.kernel(program, signature, program.moving)[0])
        return found


def _given(kernel: Kernel, plan: Plan[Launch], launch: Launch) -> dict[str, Any]:
    """The arguments of a kernel that are numbers."""
    given: dict[str, Any] = {word: plan.numbers[symbol] for word, symbol in kernel.numbers.items()}
    for word, symbol in kernel.integers.items():
        given[word] = int(plan.numbers[symbol])
    if kernel.values:
        values = torch.stack([plan.vector(symbol) for symbol in kernel.values], 1)
        given["values"] = values if len(plan.launches) == 1 else values[launch.where]
    if "t" in kernel.arguments:
        given["t"] = plan.batch.t
    return given
