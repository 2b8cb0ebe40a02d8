"""The fast engine for CPUs: the update as a straight line of in-place torch calls, block by block.

Plain torch walks over memory once per operation. Here a program is printed as Python text whose every line writes
into a buffer that exists already (`lerp(m, g, c0, out=m)`), and that text runs on blocks small enough to stay in
the cache, so main memory is read and written once. Small tensors are packed into one block, which makes many of
them as cheap as one. No compiler is needed, nothing is compiled, and a change of any float changes nothing.

A reduction cuts the program into passes: each pass computes again what its sums need, block by block, and writes
nothing; the last pass writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.distributed.philox import normals
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.language.math import FUNCTIONS
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Kind, Symbol
from lightning_optim.storage import Quantized

name = "blocked"

BLOCK = 32768  # elements per thread and block: a block of each of four float32 buffers fits a cache of 1 MiB
PACKED = 2048  # tensors up to this size share a block: copying them there costs less than calls of their own


def refusal(programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """Why this engine cannot serve, in one sentence; empty where it can."""
    if not all(program.elementwise for program in programs):
        return "the update needs means along an axis of the whole tensor."
    if any(p.device.type != "cpu" for p in params):
        return "a parameter is not on the CPU."
    return ""


def run(step: Step) -> None:
    """Run a step block by block."""
    plans = [_Plan(batch, step) for batch in step.batches]
    everything = float(sum(row.numel for row in step.params))
    for plan in plans:
        plan.everything = everything
    levels = max((batch.program.levels for batch in step.batches), default=0)
    for level in range(1, levels + 1):
        _reduce(plans, level, step)
    shared: dict[str, float] = {}
    for plan in plans:
        plan.write(shared)
    for slot, value in shared.items():
        step.shared[slot].fill_(value)


def _reduce(plans: Sequence[_Plan], level: int, step: Step) -> None:
    """Compute all sums of one level, for all tensors, and combine them."""
    found: dict[tuple[Any, ...], list[tuple[dict[Symbol, float], Symbol, float, tuple[Any, ...]]]] = {}
    for plan in plans:
        place = {symbol: where for where, symbol in plan.batch.program.sums(level)}
        for row, known in zip(plan.batch.params, plan.known, strict=True):
            for symbol, partial in plan.partials(row, known, list(place)):
                of_elements = symbol.args[0].kind == Kind.ELEMENT
                found.setdefault(place[symbol], []).append(
                    (known, symbol, partial, row.process_groups if of_elements else ())
                )
    for (over, by, _), entries in found.items():
        groups = [entry[3] for entry in entries]
        totals = step.reductions.reduce([entry[2] for entry in entries], groups, over, by)
        for (known, symbol, _, _), total in zip(entries, totals, strict=True):
            known[symbol] = float(total)


class _Plan:
    """One batch: its program with the numbers of this step filled in."""

    def __init__(self, batch: Batch, step: Step) -> None:
        self.batch, self.step = batch, step
        self.everything = 0.0
        host = batch.program.numbers(batch.h)
        per_tensor = any(symbol.kind == Kind.SCALAR for symbol in batch.program.symbols)
        self.host = host
        self.known = [dict(host) for _ in batch.params] if per_tensor else [host] * len(batch.params)
        self.packable = not per_tensor

    def _number(self, symbol: Symbol, known: dict[Symbol, float], row: LocalParameter) -> float:
        """The value of a symbol that is one number for a tensor."""
        if symbol.name == "scalar":
            slot = symbol.args[0]
            return float(self.step.shared[slot] if slot in self.step.shared else row.state[slot])
        if symbol.name == "count":
            return float(row.numel) if symbol.args[0] == "tensor" else self.everything
        args = (known[arg] if isinstance(arg, Symbol) else arg for arg in symbol.args)
        return FUNCTIONS[symbol.name].number(*args)  # type: ignore[no-any-return]

    def _fill(self, row: LocalParameter, known: dict[Symbol, float], level: int) -> None:
        """Evaluate the numbers of one tensor that follow from what is known up to a level."""
        for symbol in self.batch.program.symbols:
            if symbol.kind == Kind.SCALAR and symbol.level <= level and symbol not in known:
                known[symbol] = self._number(symbol, known, row)

    def partials(
        self, row: LocalParameter, known: dict[Symbol, float], wanted: Sequence[Symbol]
    ) -> Iterator[tuple[Symbol, float]]:
        """What this process contributes of one tensor to each of the wanted sums and maxima."""
        if not wanted:
            return
        self._fill(row, known, wanted[0].level - 1)
        elements = [symbol for symbol in wanted if symbol.args[0].kind == Kind.ELEMENT]
        sums = {symbol: 0.0 if symbol.args[2] == "sum" else -torch.inf for symbol in elements}
        if elements:
            code = _lower(self.batch.program, tuple(symbol.args[0] for symbol in elements), ())
            for views in _blocks([row], code, row.compute_dtype, False, draws=_drawn(code, known)):
                values = code.run(views, [known[symbol] for symbol in code.numbers])
                for symbol, value in zip(elements, values, strict=True):
                    if symbol.args[2] == "sum":
                        sums[symbol] += float(value.sum(dtype=torch.float64))
                    else:
                        sums[symbol] = max(sums[symbol], float(value.max()))
        for symbol in wanted:
            of = symbol.args[0]
            yield symbol, sums[symbol] if symbol in sums else known[of] if isinstance(of, Symbol) else of

    def write(self, shared: dict[str, float]) -> None:
        """The last pass: compute and write the parameter and the slots."""
        program = self.batch.program
        outputs = tuple(name for name in program.outputs if name in program.writes)
        code = _lower(program, tuple(program.outputs[name] for name in outputs), outputs)
        for row, known in zip(self.batch.params, self.known, strict=True):
            if not self.packable:
                self._fill(row, known, 1 << 30)
            self._write_numbers(row, known, shared)
        for rows, known in self._packs():
            numbers = [known[symbol] for symbol in code.numbers]
            for views in _blocks(rows, code, rows[0].compute_dtype, True, self.batch.t, _drawn(code, known)):
                code.run(views, numbers)

    def _write_numbers(self, row: LocalParameter, known: dict[Symbol, float], shared: dict[str, float]) -> None:
        """Write the slots that are one number, and outputs that are a constant."""
        for slot, value in self.batch.program.outputs.items():
            if slot in self.batch.program.writes:
                continue
            number = known[value] if isinstance(value, Symbol) else float(value)
            if slot in self.step.shared:
                shared[slot] = number
            else:
                (row.param if slot == "p" else row.state[slot]).fill_(number)

    def _packs(self) -> Iterator[tuple[list[LocalParameter], dict[Symbol, float]]]:
        """Local parameters to be served together: single large ones, and small ones of the same types side by side."""
        rows = self.batch.params
        if not self.packable:
            yield from (([row], known) for row, known in zip(rows, self.known, strict=True))
            return
        cache = self.batch.cache
        if name not in cache:
            cache[name] = _packed_rows(rows)
        yield from ((pack, self.host) for pack in cache[name])


def _packed_rows(rows: Sequence[LocalParameter]) -> list[list[LocalParameter]]:
    """list[LocalParameter], small ones of one type together as far as they fill a block."""
    found: list[list[LocalParameter]] = []
    open_packs: dict[Any, tuple[list[LocalParameter], int]] = {}
    for row in rows:
        quantized = any(
            isinstance(value, Quantized) for value in row.state.values()
        )  # also a small piece of a large tensor
        numel = row.param.numel()
        if quantized or numel > PACKED:
            found.append([row])
            continue
        pack, filled = open_packs.get(row.compute_dtype, ([], BLOCK))
        if filled + numel > BLOCK:
            pack, filled = [], 0
            found.append(pack)
        pack.append(row)
        open_packs[row.compute_dtype] = pack, filled + numel
    return found


# ---------------------------------------------------------------------------------------------- the printed program


@dataclass(frozen=True)
class _Code:
    """A pass as Python text.

    Attributes:
        run: Takes the views (inputs, then scratch) and the numbers; returns what `_lower` was asked for, if nothing is
            to be written.
        inputs: Names of the buffers that it reads or writes, in the order of the views.
        written: Names of the buffers that it writes.
        scratch: How many buffers of the compute type it needs besides, and how many of bools.
        numbers: The symbols whose values it takes, in order.
        draws: The inputs that are normal numbers, by name.
        text: The text.
    """

    run: Callable[[Sequence[Tensor], Sequence[float]], Sequence[Tensor]]
    inputs: tuple[str, ...]
    written: tuple[str, ...]
    scratch: tuple[int, int]
    numbers: tuple[Symbol, ...]
    draws: dict[str, Symbol]
    text: str


# A program knows its optimizer and so the model: it must not outlive them here.
_codes: WeakKeyDictionary[Program, dict[tuple[tuple[Symbol, ...], tuple[str, ...]], _Code]] = WeakKeyDictionary()


def _lower(program: Program, values: tuple[Symbol, ...], outputs: tuple[str, ...]) -> _Code:
    codes = _codes.setdefault(program, {})
    if (values, outputs) not in codes:  # symbols compare by identity
        codes[values, outputs] = _Printer(program, values, outputs).code()
    return codes[values, outputs]


class _Printer:
    """Prints the symbols that some values depend on, reusing buffers as soon as their last reader is done.

    A slot's new value is computed in the slot's own buffer where nobody reads the old one later.
    """

    def __init__(self, program: Program, values: tuple[Symbol, ...], outputs: tuple[str, ...]) -> None:
        self.program = program
        self.values, self.outputs = values, outputs
        needed = _needed(values)
        leaves = ("element", "normal")
        self.order = [s for s in program.symbols if s in needed and s.kind == Kind.ELEMENT and s.name not in leaves]
        self.draws = {f"normal{i}": s for i, s in enumerate(program.normals) if s in needed}
        self.inputs = [s.args[0] for s in program.symbols if s in needed and s.name == "element"]
        self.inputs += [name for name in (*outputs, *self.draws) if name not in self.inputs]
        self.numbers: dict[Symbol, str] = {}
        self.lines: list[str] = []
        self.where: dict[Symbol, str] = {s: s.args[0] for s in program.symbols if s in needed and s.name == "element"}
        self.where.update({s: name for name, s in self.draws.items()})
        self.free: dict[str, list[str]] = {"t": [], "b": []}
        self.count = {"t": 0, "b": 0}
        self.last: dict[Symbol, int] = {}
        for position, symbol in enumerate(self.order):
            for arg in symbol.args:
                if isinstance(arg, Symbol):
                    self.last[arg] = position
        for value in values:
            self.last[value] = len(self.order)

    def code(self) -> _Code:
        homes = self._homes()
        for position, symbol in enumerate(self.order):
            args = [self._argument(arg) for arg in symbol.args]
            dying = [
                arg
                for arg in dict.fromkeys(symbol.args)
                if isinstance(arg, Symbol)
                and self.last[arg] == position
                and self.where.get(arg, "")[:1] in ("t", "b")
                and self.where[arg][1:].isdigit()
            ]
            kind = "b" if symbol.name in ("gt", "ge") else "t"
            for arg in dying:
                self.free[self.where[arg][0]].append(self.where[arg])
            target = homes.get(symbol) or self._buffer(kind)
            self.where[symbol] = target
            self._print(symbol.name, symbol.args, args, target)
        moves = [(out, self.where[v]) for out, v in zip(self.outputs, self.values, strict=False)]
        moves = [(target, source) for target, source in moves if target != source]
        taken = {source for _, source in moves} & {target for target, _ in moves}
        for source in taken:  # a buffer that is both moved from and moved to: keep its value first
            keep = self._buffer("t")
            self.lines.append(f"{keep}.copy_({source})")
            moves = [(t, keep if s == source else s) for t, s in moves]
        self.lines += [f"{target}.copy_({source})" for target, source in moves]
        result = "()" if self.outputs else "(" + "".join(self.where[v] + ", " for v in self.values) + ")"
        names = [*self.inputs, *(f"t{i}" for i in range(self.count["t"])), *(f"b{i}" for i in range(self.count["b"]))]
        head = ["def run(views, numbers):", f"    ({''.join(n + ', ' for n in names)}) = views"]
        head += [f"    ({''.join(n + ', ' for n in self.numbers.values())}) = numbers"] if self.numbers else []
        text = "\n".join([*head, *(f"    {line}" for line in self.lines), f"    return {result}", ""])
        scope: dict[str, Any] = {"torch": torch, **{n: f.tensor for n, f in FUNCTIONS.items()}}
        exec(text, scope)  # the text is made from our own symbols only
        written = tuple(dict.fromkeys(self.outputs))
        counts = (self.count["t"], self.count["b"])
        return _Code(scope["run"], tuple(self.inputs), written, counts, tuple(self.numbers), self.draws, text)

    def _homes(self) -> dict[Symbol, str]:
        """For each output that may be computed in its own buffer, that buffer."""
        homes: dict[Symbol, str] = {}
        old = {s.args[0]: s for s in self.where}
        for out, value in zip(self.outputs, self.values, strict=False):
            if value in self.where or value in homes:
                continue  # an input moved elsewhere, or a value that two slots share
            before = old.get(out)
            if before is None or self.last.get(before, -1) <= self.order.index(value):
                homes[value] = out
        return homes

    def _buffer(self, kind: str) -> str:
        if self.free[kind]:
            return self.free[kind].pop()
        self.count[kind] += 1
        return f"{kind}{self.count[kind] - 1}"

    def _argument(self, arg: Any) -> str:
        if isinstance(arg, Symbol) and arg.kind == Kind.ELEMENT:
            return self.where[arg]
        if isinstance(arg, Symbol):
            return self.numbers.setdefault(arg, f"n{len(self.numbers)}")
        return repr(float(arg)) if isinstance(arg, int | float) else repr(arg)

    def _print(self, name: str, symbols: Sequence[Any], args: list[str], target: str) -> None:
        """One line: the torch call that computes a symbol into `target`."""
        is_tensor = [isinstance(s, Symbol) and s.kind == Kind.ELEMENT for s in symbols]
        like = next(arg for arg, tensor in zip(args, is_tensor, strict=True) if tensor)
        if name in ("add", "mul") and not is_tensor[0]:
            args, is_tensor = args[::-1], is_tensor[::-1]
        if name in ("maximum", "minimum") and not all(is_tensor):
            tensor, number = (args[0], args[1]) if is_tensor[0] else (args[1], args[0])
            bound = "min" if name == "maximum" else "max"
            self.lines.append(f"torch.clamp({tensor}, {bound}={number}, out={target})")
            return
        needs_tensor = {"add": 1, "mul": 1, "sub": 1, "div": 1, "lerp": 2, "gt": 1, "ge": 1}.get(name, 0)
        needs_tensor = 3 if name == "where" else needs_tensor
        for i in range(min(needs_tensor, len(args))):
            if not is_tensor[i]:
                args[i] = f"{like if not like.startswith('b') else target}.new_tensor({args[i]})"
        self.lines.append(f"{name}({', '.join(args)}, out={target})")


def _needed(values: Iterable[Any]) -> set[Symbol]:
    """The symbols that must be computed element by element, and the numbers that they take."""
    found: set[Symbol] = set()

    def visit(value: Any) -> None:
        if isinstance(value, Symbol) and value not in found:
            found.add(value)
            if value.kind == Kind.ELEMENT:
                for arg in value.args:
                    visit(arg)

    for value in values:
        visit(value)
    return found


# ---------------------------------------------------------------------------------------------- blocks


def _drawn(code: _Code, known: dict[Symbol, float]) -> dict[str, tuple[int, int]]:
    """The seed and the step of each input that is drawn."""
    found = {}
    for name, symbol in code.draws.items():
        low, high, t = (int(known[arg]) if isinstance(arg, Symbol) else int(arg) for arg in symbol.args)
        found[name] = (high << 32 | low, t)
    return found


def _draw(of: tuple[int, int], parts: Sequence[tuple[LocalParameter, int, int]], dtype: torch.dtype) -> Tensor:
    """The normal numbers of some parts of rows, one after another."""
    sites = [(row.global_index, low, high) for row, low, high in parts if row.global_index is not None]
    return normals(*of, sites, "cpu", dtype)


def _blocks(
    rows: list[LocalParameter],
    code: _Code,
    dtype: torch.dtype,
    write: bool,
    t: int = 0,
    draws: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Iterator[list[Tensor]]:
    """The views of one block after another; what was staged is written back when the next block is asked for.

    A buffer is staged where the slot itself cannot be a one-dimensional view of the compute type: several small
    tensors in one block, half precision, codes, or a tensor that is not contiguous.
    """
    total = sum(row.param.numel() for row in rows)
    if total == 0:
        return
    size = min(total, BLOCK * torch.get_num_threads())
    scratch = _scratch(dtype, torch.bool, code.scratch, size)
    if len(rows) > 1:
        yield from _packed(rows, code, dtype, scratch, write, draws)
        return
    row = rows[0]
    held = {name: _held(row, name) for name in code.inputs if name not in draws}
    quantized = [name for name, value in held.items() if isinstance(value, Quantized)]
    flat = {name: value.reshape(-1) for name, value in held.items() if isinstance(value, Tensor)}  # a copy if strided
    staged = {name: torch.empty(size, dtype=dtype) for name, value in flat.items() if value.dtype != dtype}
    for low in range(0, total, size):
        high = min(low + size, total)
        values = storage.read(row.state, quantized, low, high)
        for name, whole in flat.items():
            part = whole[low:high]
            values[name] = staged[name][: high - low].copy_(part) if name in staged else part
        values.update({name: _draw(of, [(row, low, high)], dtype) for name, of in draws.items()})
        yield [*(values[name] for name in code.inputs), *(s[: high - low] for s in scratch)]
        if write:
            for name in code.written:
                if name in staged:
                    flat[name][low:high].copy_(values[name])
            storage.write(row.state, {name: values[name] for name in quantized if name in code.written}, t, low)
    for name in code.written if write else ():
        value = held[name]
        if isinstance(value, Tensor) and not value.is_contiguous():
            value.copy_(flat[name].view(value.shape))


def _packed(
    rows: list[LocalParameter],
    code: _Code,
    dtype: torch.dtype,
    scratch: tuple[Tensor, ...],
    write: bool,
    draws: Mapping[str, tuple[int, int]],
) -> Iterator[list[Tensor]]:
    """One block that holds several small tensors side by side."""
    sizes = [row.param.numel() for row in rows]
    total = sum(sizes)
    tensors = {name: [_held(row, name) for row in rows] for name in code.inputs if name not in draws}
    views = {name: torch.empty(total, dtype=dtype) for name in tensors}
    for name, group in tensors.items():
        torch._foreach_copy_(torch.split(views[name], sizes), [tensor.reshape(-1) for tensor in group])
    views.update(
        {name: _draw(of, [(r, 0, n) for r, n in zip(rows, sizes, strict=True)], dtype) for name, of in draws.items()}
    )
    yield [*(views[name] for name in code.inputs), *(s[:total] for s in scratch)]
    for name in code.written if write else ():
        parts = torch.split(views[name], sizes)
        shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors[name], strict=True)]
        torch._foreach_copy_(tensors[name], shaped)


def _held(row: LocalParameter, name: str) -> Any:
    """What holds an input of the update: a tensor, or codes."""
    return row.param if name == "p" else row.grad if name == "g" else row.state[name]


@functools.lru_cache(maxsize=8)
def _scratch(dtype: torch.dtype, flags: torch.dtype, counts: tuple[int, int], size: int) -> tuple[Tensor, ...]:
    """Buffers that are overwritten in every block."""
    return (
        *(torch.empty(size, dtype=dtype) for _ in range(counts[0])),
        *(torch.empty(size, dtype=flags) for _ in range(counts[1])),
    )
