"""How an engine with kernels runs a step: launches, and between them the numbers that follow from sums.

A reduction cuts the update into passes: a pass computes again what its sums need and stores one partial result per
block, which are added up in a fixed order; the last pass writes. What is one number per tensor stays where the
tensors are, as a float64 vector, so that on a GPU the host waits for nothing. What a kernel is and how it is launched
is the backend's business (`triton.py`, `compiled.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_optim.engines.launch import Layout, Table, grouping, moved, pinned
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.language.math import FUNCTIONS
from lightning_optim.language.program import Program, look_up
from lightning_optim.language.symbols import Kind, Symbol


@dataclass(frozen=True)
class Text:
    """A kernel as text.

    Attributes:
        name: The name of the kernel in it.
        text: The text.
        arguments: Names of the arguments after the table, with their types.
        numbers: The symbols behind arguments that are numbers, by name.
        integers: The symbols behind arguments that are whole numbers, by name.
        values: The symbols that are one number per tensor, in the order of the columns of `values`.
        sums: How many results it stores per block; 0 for a pass that writes.
        by: Whether these are sums or maxima.
    """

    name: str
    text: str
    arguments: dict[str, str]
    numbers: dict[str, Symbol]
    integers: dict[str, Symbol]
    values: tuple[Symbol, ...]
    sums: int = 0
    by: str = ""


class Backend(Protocol):
    """What prints and launches kernels."""

    name: str
    by_alignment: bool
    tile: int

    @property
    def served(self) -> Sequence[torch.dtype]:
        """The types that kernels read and write."""
        ...

    def write_text(self, program: Program, outputs: Sequence[str], layout: Layout) -> Text:
        """The pass that computes and stores the parameter and slots named in `outputs`."""
        ...

    def reduce_text(self, program: Program, of: Sequence[Symbol], by: str, layout: Layout) -> Text:
        """A pass that stores, for each block, the sum or the maximum of each of some symbols."""
        ...

    def build(self, text: Text) -> Any:
        """What can be launched."""
        ...

    def launch(self, text: Text, kernel: Any, table: Table, given: dict[str, Any]) -> None:
        """Run a kernel over all blocks; `given` holds its arguments, `partials` among them for a pass of sums."""
        ...

    def combine(self, text: Text, partials: Tensor, table: Table) -> Tensor:
        """The results of each tensor, (tensors, sums), from those of its blocks."""
        ...


def run(step: Step, backend: Backend) -> None:
    """Run a step with one launch per batch, and one or two more for each level of reductions."""
    everything = float(sum(row.numel for row in step.params)) if _counts_all(step) else 0.0
    plans = [Plan(batch, step, everything, backend) for batch in step.batches]
    levels = max((batch.program.levels for batch in step.batches), default=0)
    for level in range(1, levels + 1):
        _reduce(plans, level, step)
    shared: dict[str, Any] = {}
    for plan in plans:
        plan.write(shared)
    for slot, value in shared.items():
        step.shared[slot].fill_(float(value))


def _counts_all(step: Step) -> bool:
    return any(symbol.name == "count" for batch in step.batches for symbol in batch.program.symbols)


def _reduce(plans: Sequence[Plan], level: int, step: Step) -> None:
    """Compute all sums of one level, for all tensors, and combine them."""
    found: dict[tuple[Any, ...], list[tuple[Plan, Symbol, Tensor, list[Any]]]] = {}
    for plan in plans:
        sums = plan.batch.program.sums(level)
        partials = plan.partials([symbol for _, symbol in sums])
        for (place, symbol), partial in zip(sums, partials, strict=True):
            of_elements = symbol.args[0].kind == Kind.ELEMENT
            groups = [row.process_groups if of_elements else () for row in plan.batch.params]
            found.setdefault(place, []).append((plan, symbol, plan.grouping.as_given(partial), groups))
    for (over, by, _), entries in found.items():
        groups = [own for entry in entries for own in entry[3]]
        totals = step.reductions.reduce_vector(torch.cat([entry[2] for entry in entries]), groups, over, by)
        parts = torch.split(totals, [len(entry[2]) for entry in entries])
        for (plan, symbol, _, _), part in zip(entries, parts, strict=True):
            plan.known[symbol] = part[0] if over == "all" else plan.grouping.as_grouped(part)


class Plan:
    """One batch: its tensors by what one launch can serve, and the numbers of this step."""

    def __init__(self, batch: Batch, step: Step, everything: float, backend: Backend) -> None:
        self.batch, self.step, self.everything, self.backend = batch, step, everything, backend
        self.device = batch.params[0].param.device
        names = columns(batch.program)
        self.grouping = grouping(batch, names, backend.served, backend.by_alignment)
        self.groups, self.rows = self.grouping.groups, self.grouping.rows
        self.tables = [group.follow(backend.tile) for group in self.groups]
        self.known = batch.program.numbers(batch.h)  # floats; later also numbers where the tensors are, or one for each

    # ------------------------------------------------------------------ numbers

    def _number(self, symbol: Symbol) -> Any:
        """The value of a symbol that is one number, or one number for each tensor."""
        if symbol.name == "host":  # a tensor: the program knows those that are none
            return look_up(self.batch.h, symbol.args[0])
        if symbol.name == "scalar":
            slot = symbol.args[0]
            if slot in self.step.shared:
                return float(self.step.shared[slot])
            numbers = torch.stack([row.state[slot] for row in self.rows]).double()
            return moved(pinned(numbers, self.device), self.device)
        if symbol.name == "count":
            return self.everything if symbol.args[0] == "all" else self.grouping.numel
        args = [self.known[arg] if isinstance(arg, Symbol) else arg for arg in symbol.args]
        if not any(isinstance(arg, Tensor) for arg in args):
            return FUNCTIONS[symbol.name].number(*args)
        if symbol.name == "where" and not isinstance(args[0], Tensor):
            return args[1] if args[0] else args[2]
        if symbol.name in ("maximum", "minimum", "where", "lerp"):  # torch wants tensors
            args = [arg if isinstance(arg, Tensor) else self._vector(arg, ()) for arg in args]
        return FUNCTIONS[symbol.name].tensor(*args)

    def _fill(self, level: int) -> None:
        """Evaluate the numbers that follow from what is known up to a level."""
        for symbol in self.batch.program.symbols:
            if symbol.kind == Kind.SCALAR and symbol.level <= level and symbol not in self.known:
                self.known[symbol] = self._number(symbol)

    def _vector(self, value: Any, shape: tuple[int, ...]) -> Tensor:
        """A value as float64 where the tensors are, filled there."""
        if isinstance(value, Tensor):
            return value.double().expand(shape)
        return torch.full(shape, value, dtype=torch.float64, device=self.device)

    # ------------------------------------------------------------------ passes

    def partials(self, wanted: Sequence[Symbol]) -> list[Tensor]:
        """What this process contributes of each tensor to each of the wanted sums and maxima."""
        if not wanted:
            return []
        self._fill(wanted[0].level - 1)
        found: dict[tuple[Symbol, str], Tensor] = {}
        for by in ("sum", "max"):
            if of := summands(self.batch.program, wanted[0].level, by):
                parts = self._launches(reduce_kernel, of, by)
                found.update(zip(((x, by) for x in of), torch.cat(parts).unbind(1), strict=True))

        def partial(x: Any, by: str) -> Tensor:
            return found[x, by] if (x, by) in found else self._vector(self.known.get(x, x), (len(self.rows),))

        return [partial(symbol.args[0], symbol.args[2]) for symbol in wanted]

    def write(self, shared: dict[str, Any]) -> None:
        """The last pass: compute and write the parameter and the slots."""
        program = self.batch.program
        self._fill(1 << 30)
        outputs = program.moving
        if outputs:
            self._launches(write_kernel, outputs)
        for column, value, copy in self.grouping.staged:
            if column in outputs:
                value.copy_(copy)
        for slot, result in program.outputs.items():
            if slot in program.writes:
                continue
            number = self.known[result] if isinstance(result, Symbol) else float(result)
            if slot in self.step.shared:
                shared[slot] = number[-1] if isinstance(number, Tensor) and number.dim() else number
                continue
            for row, own in zip(self.rows, self._vector(number, (len(self.rows),)).tolist(), strict=True):
                (row.param if slot == "p" else row.state[slot]).fill_(own)

    def _launches(self, kernel_of: Callable[..., tuple[Text, Any]], *what: Any) -> list[Tensor]:
        """Launch a pass for each group; the sums of each tensor, where the pass computes sums."""
        results, low = [], 0
        for group, table in zip(self.groups, self.tables, strict=True):
            text, kernel = kernel_of(self.backend, self.batch.program, *what, group.layout)
            high = low + len(group.rows)
            given: dict[str, Any] = {word: self.known[symbol] for word, symbol in text.numbers.items()}
            given.update({word: int(self.known[symbol]) for word, symbol in text.integers.items()})
            if text.values:
                vectors = [self._vector(self.known[s], (len(self.rows),))[low:high] for s in text.values]
                given["values"] = torch.stack(vectors, 1)
            if "t" in text.arguments:
                given["t"] = self.batch.t
            if text.sums:
                given["partials"] = torch.empty(table.count, text.sums, dtype=torch.float64, device=self.device)
            if table.count:
                self.backend.launch(text, kernel, table, given)
            if text.sums:
                results.append(self.backend.combine(text, given["partials"], table))
            low = high
        return results


def columns(program: Program) -> list[str]:
    """Names of what a program reads and writes of each element."""
    slots = sorted({*program.reads, *program.writes} - {"p", "g"})
    return ["p", *(["g"] if "g" in program.reads else []), *slots, *(["site"] if program.normals else [])]


def summands(program: Program, level: int, by: str) -> tuple[Symbol, ...]:
    """What a pass of this level sums, or takes the maximum of, over elements."""
    wanted = (s for s in program.reductions if s.level == level and s.args[2] == by)
    return tuple(symbol.args[0] for symbol in wanted if symbol.args[0].kind == Kind.ELEMENT)


# A program knows its optimizer and so the model: it must not outlive them here.
_kernels: WeakKeyDictionary[Program, dict[Any, tuple[Text, Any]]] = WeakKeyDictionary()


def write_kernel(backend: Backend, program: Program, outputs: tuple[str, ...], layout: Layout) -> tuple[Text, Any]:
    """The text of the last pass, and what can be launched."""
    known = _kernels.setdefault(program, {})
    key = (backend.name, outputs, layout)
    if key not in known:
        text = backend.write_text(program, outputs, layout)
        known[key] = text, backend.build(text)
    return known[key]


def reduce_kernel(
    backend: Backend, program: Program, of: tuple[Symbol, ...], by: str, layout: Layout
) -> tuple[Text, Any]:
    """The text of a pass of sums or maxima, and what can be launched."""
    known = _kernels.setdefault(program, {})
    key = (backend.name, of, by, layout)
    if key not in known:
        text = backend.reduce_text(program, of, by, layout)
        known[key] = text, backend.build(text)
    return known[key]


def texts(backend: Backend, program: Program, rows: Sequence[LocalParameter]) -> list[Text]:
    """The kernels that serve a program on tensors like these, in the order of their launches."""
    found = []
    groups = grouping(Batch.of(program, {}, params=rows), columns(program), backend.served, backend.by_alignment).groups
    for layout in dict.fromkeys(group.layout for group in groups):
        for level in sorted({symbol.level for symbol in program.reductions}):
            sums = {by: summands(program, level, by) for by in ("sum", "max")}
            found += [reduce_kernel(backend, program, of, by, layout)[0] for by, of in sums.items() if of]
        outputs = program.moving
        found += [write_kernel(backend, program, outputs, layout)[0]] if outputs else []
    return found
