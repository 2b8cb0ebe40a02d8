"""The engine for GPUs: one launch for all tensors of a job, of a kernel that is printed from the update.

The arithmetic is that of the reference, operation by operation in float32, and a parameter is rounded once. Floats
enter as arguments, so a schedule compiles nothing. A reduction cuts the update into passes, as in the blocked engine:
a pass computes again what its sums need and stores one partial result per block, which are added up in a fixed order;
what is one number per tensor then stays on the device, in a small table that the last pass reads.

Without a GPU the same kernels run in Triton's interpreter, slowly, to be tested there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import linecache
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.job import Job, Row, Step
from lightning_optim.engines.triton_text import TILE, Column, Layout, Text, reduce_text, write_text
from lightning_optim.math import FUNCTIONS
from lightning_optim.storage import Coded
from lightning_optim.storage.dynamic import book
from lightning_optim.trace import Kind, Program, Symbol, look_up

name = "triton"

SERVED = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
# Multiplications and additions stay apart, as in torch, so that the numbers are the same. The bound on registers lets
# three programs run on a processor; without one the assembler spills a register or two to fit one more.
OPTIONS = {"num_warps": WARPS, "maxnreg": 168, "enable_fp_fusion": False}
TABLES = 64  # address tables that are kept; a step needs one or two


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why this engine cannot serve, in one sentence; empty where it can."""
    if not _installed():
        return "triton is not installed."
    if not all(program.elementwise for program in programs):
        return "the update needs means along an axis of the whole tensor."
    if len({p.device for p in params}) > 1:
        return "the parameters are on several devices."
    if any(p.device.type != "cuda" for p in params) and not _interpreted():
        return "a parameter is not on a GPU (TRITON_INTERPRET=1, set before triton is imported, runs it on the CPU)."
    # A complex number is a pair of float32 to an engine.
    unserved = next((p.dtype for p in params if p.dtype not in (*SERVED, torch.complex64)), None)
    return f"it computes in float32, and a parameter is {str(unserved).removeprefix('torch.')}." if unserved else ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(step: Step) -> None:
    """Run a step with one launch per job, and one or two more for each level of reductions."""
    rows = step.rows
    everything = float(sum(row.numel for row in rows))
    device = rows[0].param.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        plans = [_Plan(job, step, everything) for job in step.jobs]
        levels = max((job.program.levels for job in step.jobs), default=0)
        for level in range(1, levels + 1):
            _reduce(plans, level, step)
        shared: dict[str, Any] = {}
        for plan in plans:
            plan.write(shared)
    for slot, value in shared.items():
        step.shared[slot].fill_(float(value))


def _reduce(plans: Sequence[_Plan], level: int, step: Step) -> None:
    """Compute all sums of one level, for all tensors, and combine them."""
    found: dict[tuple[Any, ...], list[tuple[_Plan, Symbol, Tensor, list[bool]]]] = {}
    for plan in plans:
        sums = plan.job.program.sums(level)
        partials = plan.partials([symbol for _, symbol in sums])
        for (place, symbol), partial in zip(sums, partials, strict=True):
            of_elements = symbol.args[0].kind == Kind.ELEMENT
            sharded = [row.sharded and of_elements for row in plan.rows]
            found.setdefault(place, []).append((plan, symbol, partial, sharded))
    for (over, by, _), entries in found.items():
        sharded = [part for entry in entries for part in entry[3]]
        totals = step.placement.combine_vector(torch.cat([entry[2] for entry in entries]), sharded, over, by)
        parts = torch.split(totals, [len(entry[2]) for entry in entries])
        for (plan, symbol, _, _), part in zip(entries, parts, strict=True):
            plan.known[symbol] = part[0] if over == "all" else part


# ---------------------------------------------------------------------------------------------- the tensors of a job


@dataclass
class _Group:
    """Tensors of a job that one launch serves.

    Attributes:
        layout: What they have in common.
        rows: The tensors.
        addresses: For one tensor after another, where its columns are.
    """

    layout: Layout
    rows: list[Row] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)

    def table(self) -> _Table:
        sizes = tuple(row.param.numel() for row in self.rows)
        return _table(self.rows[0].param.device, self.layout.width, sizes, tuple(self.addresses))


def _grouped(program: Program, rows: Sequence[Row], staged: list[tuple[str, Tensor, Tensor]]) -> list[_Group]:
    """The rows by what one launch can serve; what could not be served as it is, and its copy, are put in `staged`."""
    slots = sorted({*program.reads, *program.writes} - {"p", "g"})
    names = ["p", *(["g"] if "g" in program.reads else []), *slots]
    groups: dict[Any, _Group] = {}
    for row in rows:  # of which there may be thousands: what is done here counts
        kinds: list[Any] = []
        addresses: list[int] = []
        for name in names:
            value: Any = row.param if name == "p" else row.grad if name == "g" else row.state[name]
            if isinstance(value, Coded):
                kinds.append(value.format)
                addresses += [value.codes.data_ptr(), value.headers.data_ptr()]
                continue
            if value.dtype not in SERVED or not value.is_contiguous():
                value = _staged(name, value, staged)
            if value.device != row.param.device:
                raise RuntimeError(
                    f"{name} of a parameter of shape {tuple(row.param.shape)} is on {value.device}, and the parameter "
                    f"on {row.param.device}. Move the model before its optimizer is made, or load the state again."
                )
            kinds.append(value.dtype)
            addresses.append(value.data_ptr())
        aligned = not any(address % 16 for address in addresses)
        key = (aligned, *kinds)
        if key not in groups:
            groups[key] = _Group(Layout(tuple(map(_column, names, kinds)), aligned))
        groups[key].rows.append(row)
        groups[key].addresses += addresses
    return list(groups.values())


def _staged(name: str, value: Tensor, staged: list[tuple[str, Tensor, Tensor]]) -> Tensor:
    """A copy that can be served."""
    dtype = value.dtype if value.dtype in SERVED else torch.float32
    copy = value.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
    staged.append((name, value, copy))
    return copy


class _Plan:
    """One job: its tensors by what one launch can serve, and the numbers of this step."""

    def __init__(self, job: Job, step: Step, everything: float) -> None:
        self.job, self.step, self.everything = job, step, everything
        self.device = job.rows[0].param.device
        self.staged: list[tuple[str, Tensor, Tensor]] = []
        self.groups = _grouped(job.program, job.rows, self.staged)
        self.rows = [row for group in self.groups for row in group.rows]
        self.tables = [group.table() for group in self.groups]
        self.known: dict[Symbol, Any] = {}  # a float, a number on the device, or one for each tensor
        for symbol in job.program.symbols:
            if symbol.kind == Kind.HOST:
                self.known[symbol] = self._number(symbol)

    # ------------------------------------------------------------------ numbers

    def _number(self, symbol: Symbol) -> Any:
        """The value of a symbol that is one number, or one number for each tensor."""
        if symbol.name == "host":
            return float(look_up(self.job.h, symbol.args[0]))
        if symbol.name == "scalar":
            slot = symbol.args[0]
            if slot in self.step.shared:
                return float(self.step.shared[slot])
            return torch.stack([row.state[slot] for row in self.rows]).to(self.device, torch.float64)
        if symbol.name == "count":
            if symbol.args[0] == "all":
                return self.everything
            return _numbers(self.device, tuple(float(row.numel) for row in self.rows))
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
        for symbol in self.job.program.symbols:
            if symbol.kind == Kind.SCALAR and symbol.level <= level and symbol not in self.known:
                self.known[symbol] = self._number(symbol)

    def _vector(self, value: Any, shape: tuple[int, ...]) -> Tensor:
        """A value as float64 on the device, filled there."""
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
            if of := _summands(self.job.program, wanted[0].level, by):
                parts = self._launches(functools.partial(_reduces, self.job.program, of, by))
                found.update(zip(((x, by) for x in of), torch.cat(parts).unbind(1), strict=True))

        def partial(x: Any, by: str) -> Tensor:
            return found[x, by] if (x, by) in found else self._vector(self.known.get(x, x), (len(self.rows),))

        return [partial(symbol.args[0], symbol.args[2]) for symbol in wanted]

    def write(self, shared: dict[str, Any]) -> None:
        """The last pass: compute and write the parameter and the slots."""
        program = self.job.program
        self._fill(1 << 30)
        outputs = _outputs(program)
        if outputs:
            self._launches(functools.partial(_writes, program, outputs))
        for column, value, copy in self.staged:
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

    def _launches(self, kernel_of: Callable[[Layout], _Kernel]) -> list[Tensor]:
        """Launch a pass for each group; the sums of each tensor, where the pass computes sums."""
        results, low = [], 0
        for group, table in zip(self.groups, self.tables, strict=True):
            kernel = kernel_of(group.layout)
            high = low + len(group.rows)
            given: dict[str, Any] = {word: self.known[symbol] for word, symbol in kernel.text.numbers.items()}
            words = kernel.text.arguments
            if kernel.text.values:
                vectors = [self._vector(self.known[s], (len(self.rows),))[low:high] for s in kernel.text.values]
                given["values"] = torch.stack(vectors, 1).float()
            for word in {"signed_book", "unsigned_book"} & words.keys():
                given[word] = book(word == "signed_book", self.device)
            if "t" in words:
                given["t"] = self.job.t
            if "partials" in words:
                given["partials"] = torch.empty(table.count, kernel.sums, dtype=torch.float64, device=self.device)
            if table.count:
                launch(kernel.function, table.count, table.rows, table.blocks, **given)
            if "partials" in words:
                result = torch.empty(len(group.rows), kernel.sums, dtype=torch.float64, device=self.device)
                constants = {"WIDTH": group.layout.width, "COUNT": kernel.sums, "MAXIMUM": kernel.by == "max"}
                launch(_codes().combine_blocks, result.numel(), given["partials"], table.rows, result, **constants)
                results.append(result)
            low = high
        return results


def _outputs(program: Program) -> tuple[str, ...]:
    """Names of the columns that the last pass writes: those whose new value is not the old one."""

    def moves(value: Any, name: str) -> bool:
        return not (value.name == "element" and value.args[0] == name)

    return tuple(n for n, value in program.outputs.items() if n in program.writes and moves(value, n))


def _summands(program: Program, level: int, by: str) -> tuple[Symbol, ...]:
    """What a pass of this level sums, or takes the maximum of, over elements."""
    wanted = (s for s in program.reductions if s.level == level and s.args[2] == by)
    return tuple(symbol.args[0] for symbol in wanted if symbol.args[0].kind == Kind.ELEMENT)


def _column(name: str, kind: Any) -> Column:
    """A column of a type, or of a format of codes."""
    if isinstance(kind, torch.dtype):
        return Column(name, str(kind).removeprefix("torch."))
    return Column(name, kind.name, kind.partner, getattr(kind, "signed", True))


# ---------------------------------------------------------------------------------------------- the address table


@dataclass(frozen=True)
class _Table:
    """Where the tensors of a launch are, on the device.

    Attributes:
        rows: (tensors + 1, width) int64: the first block, the number of elements, the addresses; the last row closes
            the last tensor.
        blocks: (count,) int32: the tensor of each block.
        count: How many blocks there are.
    """

    rows: Tensor
    blocks: Tensor
    count: int


_tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()


def _table(device: torch.device, width: int, sizes: tuple[int, ...], addresses: tuple[int, ...]) -> _Table:
    """The table of these tensors: the one of the step before, as long as nothing moves."""
    key = (device, width, sizes, addresses)
    if key not in _tables:
        _tables[key] = build_table(device, width, sizes, addresses)
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def build_table(device: torch.device, width: int, sizes: tuple[int, ...], addresses: tuple[int, ...]) -> _Table:
    """Write down where tensors of these sizes are."""
    numel = torch.tensor(sizes, dtype=torch.int64)
    blocks = (numel + TILE - 1) // TILE
    rows = torch.zeros(len(sizes) + 1, width, dtype=torch.int64)
    rows[1:, 0] = blocks.cumsum(0)
    rows[:-1, 1] = numel
    rows[:-1, 2:] = torch.tensor(addresses, dtype=torch.int64).view(len(sizes), width - 2)
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    return _Table(_moved(rows, device), _moved(tensor_of, device), len(tensor_of))


@functools.lru_cache(maxsize=TABLES)
def _numbers(device: torch.device, values: tuple[float, ...]) -> Tensor:
    return _moved(torch.tensor(values, dtype=torch.float64), device)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made in the order of its stream: the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


# ---------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class _Kernel:
    """A printed kernel, ready to launch.

    Attributes:
        text: What it was made from.
        function: What Triton made of it.
        sums: How many results it stores per block.
        by: Whether these are sums or maxima.
    """

    text: Text
    function: Any
    sums: int = 0
    by: str = ""


_kernels: weakref.WeakKeyDictionary[Program, dict[Any, _Kernel]] = weakref.WeakKeyDictionary()


def _writes(program: Program, outputs: tuple[str, ...], layout: Layout) -> _Kernel:
    known = _kernels.setdefault(program, {})
    if (outputs, layout) not in known:
        text = write_text(program, outputs, layout)
        known[outputs, layout] = _Kernel(text, compiled(text.name, text.text))
    return known[outputs, layout]


def _reduces(program: Program, of: tuple[Symbol, ...], by: str, layout: Layout) -> _Kernel:
    known = _kernels.setdefault(program, {})
    if (of, by, layout) not in known:
        text = reduce_text(program, of, by, layout)
        known[of, by, layout] = _Kernel(text, compiled(text.name, text.text), len(of), by)
    return known[of, by, layout]


@functools.cache
def compiled(name: str, text: str) -> Any:
    """The Triton function of this name in a text. Programs with the same text share it."""
    import triton
    import triton.language as tl

    file = f"<lightning_optim {name} {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)  # where Triton and tracebacks read it
    device_functions = {word: value for word, value in vars(_codes()).items() if not word.startswith("__")}
    scope = {**device_functions, "triton": triton, "tl": tl, "__name__": f"lightning_optim.printed.{name}"}
    exec(compile(text, file, "exec"), scope)  # the text is made from our own symbols only
    return scope[name]


def _codes() -> Any:
    from lightning_optim.engines import triton_codes

    return triton_codes


def launch(function: Any, count: int, *args: Any, **options: Any) -> None:
    """Run a kernel."""
    function[(count,)](*args, **options, **OPTIONS)


def texts(program: Program, rows: Sequence[Row]) -> list[Text]:
    """The kernels that serve a program on tensors like these, in the order of their launches."""
    found = []
    for layout in dict.fromkeys(group.layout for group in _grouped(program, rows, [])):
        for level in sorted({symbol.level for symbol in program.reductions}):
            for by in ("sum", "max"):
                found += [_reduces(program, of, by, layout).text] if (of := _summands(program, level, by)) else []
        outputs = _outputs(program)
        found += [_writes(program, outputs, layout).text] if outputs else []
    return found


def source(program: Program, rows: Sequence[Row]) -> str:
    """The text of these kernels, to be read."""
    return "\n\n".join(text.text for text in texts(program, rows))
