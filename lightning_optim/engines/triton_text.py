"""The text of a Triton kernel, printed from the graph of an update.

A launch serves any number of tensors: `blocks` says which tensor a program instance belongs to, and the row of that
tensor in `table` holds its first block, its number of elements and the address of each of its columns (the parameter,
the gradient, the slots; two addresses for a slot in codes). A tile is printed once and called twice: where the
number of its elements is a multiple of 8 the compiler can prove it, and moves 16 bytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_optim.storage.coded import BLOCK
from lightning_optim.trace import Kind, Program, Symbol

TILE = 4 * BLOCK  # elements of a program instance: 8 for each of 128 threads, two accesses of 16 bytes in float32
WORD = 8  # elements that are masked alike: 16 bytes in half precision

EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "tl.div_rn({}, {})",
    "pow": "power({}, {})",
    "neg": "-{}",
    "abs": "tl.abs({})",
    "sqrt": "tl.sqrt_rn({})",
    "exp": "tl.exp({})",
    "sign": "sign({})",
    "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "lerp": "lerp({}, {}, {})",
    "where": "tl.where({}, {}, {})",
    "gt": "{} > {}",
    "ge": "{} >= {}",
}
INLINE = 60  # a longer expression gets a line of its own


@dataclass(frozen=True)
class Column:
    """Where one per-element value of a tensor is kept.

    Attributes:
        name: `"p"`, `"g"` or a slot.
        kind: A type, as float32, or a format of codes: log, ratio, dynamic.
        partner: The slot that codes need for their meaning.
        signed: Whether a table of codes is the signed one.
    """

    name: str
    kind: str
    partner: str | None = None
    signed: bool = True

    @property
    def coded(self) -> bool:
        return self.kind in ("log", "ratio", "dynamic")

    @property
    def places(self) -> int:
        """How many addresses it has."""
        return 2 if self.coded else 1

    @property
    def book(self) -> str:
        """The argument that holds its table of codes."""
        return "signed_book" if self.signed else "unsigned_book"


@dataclass(frozen=True)
class Layout:
    """What the tensors of one launch have in common.

    Attributes:
        columns: Their per-element values, in the order of the table.
        aligned: Whether every address is a multiple of 16.
    """

    columns: tuple[Column, ...]
    aligned: bool

    @property
    def width(self) -> int:
        """Numbers in a row of the table."""
        return 2 + sum(column.places for column in self.columns)


@dataclass(frozen=True)
class Text:
    """A kernel as text.

    Attributes:
        name: The name of the kernel in it.
        text: The text.
        arguments: Names of the arguments after `table` and `blocks`, with their Triton types.
        numbers: The symbols behind arguments that are numbers, by name.
        values: The symbols that are one number per tensor, in the order of the columns of `values`.
    """

    name: str
    text: str
    arguments: dict[str, str]
    numbers: dict[str, Symbol]
    values: tuple[Symbol, ...]


def write_text(program: Program, outputs: Sequence[str], layout: Layout) -> Text:
    """The last pass: computes and stores the parameter and slots named in `outputs`."""
    return _Printer(program, layout, [program.outputs[name] for name in outputs], outputs, "", "step").text()


def reduce_text(program: Program, of: Sequence[Symbol], by: str, layout: Layout) -> Text:
    """A pass that stores, for each block, the sum or the maximum of each of some symbols."""
    return _Printer(program, layout, of, (), by, f"{by}s").text()


class _Printer:
    """Prints the symbols that some values depend on, one line each, or inside the line that alone reads it."""

    def __init__(
        self, program: Program, layout: Layout, values: Sequence[Symbol], outputs: Sequence[str], by: str, role: str
    ) -> None:
        self.program, self.values, self.outputs, self.by = program, values, outputs, by
        self.layout = layout
        self.column = {column.name: column for column in layout.columns}
        self.owner = _owner(program)
        self.name = f"{self.owner}_{role}"
        self.uses: dict[Symbol, int] = dict.fromkeys(values, 2)  # a result gets a line of its own
        for symbol in reversed(program.symbols):
            if symbol in self.uses and symbol.kind == Kind.ELEMENT:
                for arg in symbol.args:
                    if isinstance(arg, Symbol):
                        self.uses[arg] = self.uses.get(arg, 0) + 1
        self.where: dict[Symbol, str] = {}
        self.numbers: dict[str, Symbol] = {}
        self.per_tensor: list[Symbol] = []
        self.taken = set(self.column)
        self.arguments: dict[str, str] = {}
        self.touched: list[Column] = []
        self.lines: list[str] = []

    def text(self) -> Text:
        self._load()
        self._compute()
        if self.outputs:
            self._store()
        else:
            self._reduce()
        arguments = {
            **({"values": "*fp32"} if self.per_tensor else {}),
            **self.arguments,
            **dict.fromkeys(self.numbers, "fp32"),
        }
        text = "\n".join([*self._tile(arguments), "", "", *self._kernel(arguments), ""])
        return Text(self.name, text, arguments, self.numbers, tuple(self.per_tensor))

    # ------------------------------------------------------------------ the tile

    def _load(self) -> None:
        reads = {symbol.args[0] for symbol in self.uses if symbol.name == "element"}
        partners = {self.column[name].partner for name in (*reads, *self.outputs)} - set(self.outputs)
        reads |= {self.column[name].partner for name in reads} | partners
        for column in sorted(self.layout.columns, key=lambda column: column.partner is not None):
            if column.name in reads or column.name in self.outputs:
                self.touched.append(column)
            if column.name in reads:
                self.lines.append(f"{column.name} = {self._read(column)}")
        self.where.update({s: s.args[0] for s in self.uses if s.name == "element"})

    def _read(self, column: Column) -> str:
        name = column.name
        if not column.coded:
            load = f"tl.load({name}_at + index, mask=inside, other=0.0)"
            return load if column.kind == "float32" else f"{load}.to(tl.float32)"
        return f"{column.kind}_decode({self._codes(column)}{self._company(column, column.partner)})"

    def _codes(self, column: Column) -> str:
        return f"{column.name}_at, {column.name}_headers, index, line, there"

    def _company(self, column: Column, partner: str | None) -> str:
        """What a format needs besides codes and headers."""
        if column.kind == "dynamic":
            self.arguments[column.book] = "*fp32"
            return f", {column.book}"
        return f", {partner}" if column.kind == "ratio" else ""

    def _compute(self) -> None:
        results = dict(zip(self.values, (f"new_{name}" for name in self.outputs), strict=False))
        for symbol in self.program.symbols:
            if symbol not in self.uses or symbol.kind != Kind.ELEMENT or symbol.name == "element":
                continue
            args = [self._argument(arg) for arg in symbol.args]
            expression = self._expression(symbol, args)
            if self.uses[symbol] == 1 and len(expression) < INLINE:
                self.where[symbol] = f"({expression})"
                continue
            name = results.get(symbol) or self._fresh("x")
            self.lines.append(f"{name} = {expression}")
            self.where[symbol] = name

    def _expression(self, symbol: Symbol, args: list[str]) -> str:
        if symbol.name == "div" and not _is_element(symbol.args[0]):  # as torch divides a number: by the reciprocal
            return f"{args[0]} * tl.div_rn(1.0, {args[1]})"
        return EXPRESSIONS[symbol.name].format(*args)

    def _fresh(self, stem: str) -> str:
        name = next(name for i in range(1 << 20) if (name := f"{stem}{i}") not in self.taken)
        self.taken.add(name)
        return name

    def _argument(self, arg: Any) -> str:
        if not isinstance(arg, Symbol):
            number = float(arg)
            return repr(number) if math.isfinite(number) else f'float("{number}")'
        if arg in self.where:
            return self.where[arg]
        if arg.kind == Kind.SCALAR:
            name = self._fresh("of_tensor_")
            self.per_tensor.append(arg)
        else:
            word = arg.args[0].replace(".", "_") if arg.name == "host" else ""
            name = word if word and word not in self.taken else self._fresh(f"{word}_" if word else "n")
            self.taken.add(name)
            self.numbers[name] = arg
        self.where[arg] = name
        return name

    def _store(self) -> None:
        kept: dict[str, str] = {}
        pairs = sorted(
            zip(self.outputs, self.values, strict=True), key=lambda pair: self.column[pair[0]].partner is not None
        )
        for name, value in pairs:
            column = self.column[name]
            new = self.where[value]
            if not column.coded:
                new = f"to_bfloat16({new})" if column.kind == "bfloat16" else new
                new = f"{new}.to(tl.float16)" if column.kind == "float16" else new
                kept[name] = self.where[value] if column.kind == "float32" else f"{new}.to(tl.float32)"
                self.lines.append(f"tl.store({name}_at + index, {new}, mask=inside)")
                continue
            kept[name] = f"kept_{name}"
            company = self._company(column, kept.get(column.partner or "", column.partner))
            if column.kind == "log":
                self.arguments["t"] = "i32"
                company = ", draws(t, start + index)"
            elif column.kind == "dynamic":
                company += f", {column.signed}"
            values = f"tl.where(inside & (tl.abs({new}) < float('inf')), {new}, 0.0)"
            self.lines.append(f"kept_{name} = {column.kind}_encode({self._codes(column)}, {values}{company})")

    def _reduce(self) -> None:
        self.arguments["partials"] = "*fp64"
        count, empty = len(self.values), "0.0" if self.by == "sum" else 'float("-inf")'
        for i, value in enumerate(self.values):
            x = self.where[value]
            masked = f"tl.where(inside, {x}, {empty}).to(tl.float64)"
            self.lines.append(f"tl.store(partials + block * {count} + {i}, tl.{self.by}({masked}))")

    # ------------------------------------------------------------------ around it

    def _pointers(self) -> list[str]:
        return [f"{column.name}{suffix}" for column in self.touched for suffix in ("_at", "_headers")[: column.places]]

    def _tile(self, arguments: dict[str, str]) -> list[str]:
        head = [f"def {self.owner}_tile(block, row, start, count, {', '.join([*self._pointers(), *arguments])}):"]
        body = [
            f"line = tl.arange(0, {TILE // BLOCK})[:, None]",
            f"index = line * {BLOCK} + tl.arange(0, {BLOCK})[None, :]",
            "inside = index < count",
        ]
        if any(column.coded for column in self.touched):
            body.append(f"there = line * {BLOCK} < count")
        for i, symbol in enumerate(self.per_tensor):
            name = self.where[symbol]
            body.append(f"{name} = tl.load(values + row * {len(self.per_tensor)} + {i})")
        notes = [f"# {name} is {symbol!r}" for name, symbol in self.numbers.items() if symbol.name != "host"]
        return ["@triton.jit", *head, *(f"    {line}" for line in [*notes, *body, *self.lines])]

    def _kernel(self, arguments: dict[str, str]) -> list[str]:
        passed = ", ".join([*self._pointers(), *arguments])
        unspecialised = '(do_not_specialize=["t"])' if "t" in arguments else ""
        body = [
            "block = tl.program_id(0)",
            "row = tl.load(blocks + block)",
            f"at = table + row.to(tl.int64) * {self.layout.width}",
            f"start = (block - tl.load(at)) * {TILE}",
            f"count = tl.minimum(tl.load(at + 1) - start, {TILE}).to(tl.int32)",
        ]
        place = 2
        for column in self.layout.columns:
            if column in self.touched:
                kind = "uint8" if column.coded else column.kind
                body.append(f"{column.name}_at = {self._address(place, kind)} + start")
                if column.coded:
                    headers = "start // 128" if column.kind == "log" else "start // 256"
                    body.append(f"{column.name}_headers = {self._address(place + 1, 'float32')} + {headers}")
            place += column.places
        body += [
            f"if count % {WORD} == 0:",
            f"    {self.owner}_tile(block, row, start, count // {WORD} * {WORD}, {passed})",
            "else:",
            f"    {self.owner}_tile(block, row, start, count, {passed})",
        ]
        head = f"def {self.name}({', '.join(['table', 'blocks', *arguments])}):"
        return [f"@triton.jit{unspecialised}", head, *(f"    {line}" for line in body)]

    def _address(self, place: int, kind: str) -> str:
        pointer = f"tl.load(at + {place}).to(tl.pointer_type(tl.{kind}))"
        return f"tl.multiple_of({pointer}, 16)" if self.layout.aligned else pointer


def _is_element(value: Any) -> bool:
    return isinstance(value, Symbol) and value.kind == Kind.ELEMENT


def _owner(program: Program) -> str:
    """The word for a program in names: the optimizer's, where it is one's."""
    owner = getattr(program.formula, "__self__", None)
    word = getattr(owner, "name", None) or "stage"
    return str(word) if str(word).isidentifier() else "update"
