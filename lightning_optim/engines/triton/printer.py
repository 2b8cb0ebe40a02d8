"""The text of a Triton kernel, printed from the graph of an update.

A launch serves any number of tensors: `blocks` says which tensor a program instance belongs to, and the row of that
tensor in `table` holds its first block, its number of elements and the address of each of its columns (the parameter,
the gradient, the slots; two addresses for a slot in codes). A tile is printed once and called twice: where the
number of its elements is a multiple of 8 the compiler can prove it, and moves 16 bytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_optim.engines.launch import Column, Layout
from lightning_optim.engines.passes import Text
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Kind, Symbol
from lightning_optim.storage.quantized import BLOCK

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
SITE = ("tensor", "first", "run", "stride")  # the fields of `philox.GlobalIndex`
INLINE = 60  # a longer expression gets a line of its own


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
        self.integers: dict[str, Symbol] = {}
        self.draws = False
        self.per_tensor: list[Symbol] = []
        self.taken = {*self.column, *SITE}
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
        sums = 0 if self.outputs else len(self.values)
        return Text(self.name, text, arguments, self.numbers, self.integers, tuple(self.per_tensor), sums, self.by)

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
        if not column.quantized:
            load = f"tl.load({name}_at + index, mask=inside, other=0.0)"
            return load if column.kind == "float32" else f"{load}.to(tl.float32)"
        return f"{column.kind}_dequantize({self._codes(column)}{self._company(column, column.partner)})"

    def _codes(self, column: Column) -> str:
        return f"{column.name}_at, {column.name}_scales, index, line, there"

    def _company(self, column: Column, partner: str | None) -> str:
        """What a format needs besides codes and scales."""
        if column.kind == "dynamic":
            self.arguments[column.codebook] = "*fp32"
            return f", {column.codebook}"
        return f", {partner}" if column.kind == "ratio" else ""

    def _compute(self) -> None:
        results = dict(zip(self.values, (f"new_{name}" for name in self.outputs), strict=False))
        for symbol in self.program.symbols:
            if symbol not in self.uses or symbol.kind != Kind.ELEMENT or symbol.name == "element":
                continue
            if symbol.name == "normal":
                expression = self._draw(symbol)
            else:
                expression = self._expression(symbol, [self._argument(arg) for arg in symbol.args])
            if self.uses[symbol] == 1 and len(expression) < INLINE:
                self.where[symbol] = f"({expression})"
                continue
            name = results.get(symbol) or self._fresh("x")
            self.lines.append(f"{name} = {expression}")
            self.where[symbol] = name

    def _expression(self, symbol: Symbol, args: list[str]) -> str:
        if symbol.name == "div" and not _is_element(symbol.args[0]):  # as torch divides a number: by the reciprocal
            return f"{args[0]} * tl.div_rn(1.0, {args[1]})"
        if symbol.name == "where" and not _is_element(symbol.args[0]):
            args[0] = f"{args[0]} != 0.0"
        return EXPRESSIONS[symbol.name].format(*args)

    def _draw(self, symbol: Symbol) -> str:
        """Normal numbers. What counts them is whole: float32 would not hold it."""
        self.draws = True
        names = []
        for arg, word in zip(symbol.args, ("seed_low", "seed_high", "draw_t"), strict=True):
            known = next((name for name, other in self.integers.items() if other is arg), None)
            names.append(known or self._fresh(f"{word}_"))
            self.integers[names[-1]] = arg
            self.arguments[names[-1]] = "i64"
        return f"normal({', '.join([*names, *SITE])}, start + index)"

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
            if not column.quantized:
                new = f"to_bfloat16({new})" if column.kind == "bfloat16" else new
                new = f"{new}.to(tl.float16)" if column.kind == "float16" else new
                kept[name] = self.where[value] if column.kind == "float32" else f"{new}.to(tl.float32)"
                self.lines.append(f"tl.store({name}_at + index, {new}, mask=inside)")
                continue
            kept[name] = f"kept_{name}"
            company = self._company(column, kept.get(column.partner or "", column.partner))
            if column.kind == "log":
                company = f", random_bits({self._step_counter()}, start + index)"
            elif column.kind == "dynamic":
                company += f", {column.signed}"
            values = f"tl.where(inside & (tl.abs({new}) < float('inf')), {new}, 0.0)"
            self.lines.append(f"kept_{name} = {column.kind}_quantize({self._codes(column)}, {values}{company})")

    def _step_counter(self) -> str:
        """The counter of the step: an argument, or where it is only on the device, one of the values there."""
        if self.program.step_counter is not None:
            return f"{self._argument(self.program.step_counter)}.to(tl.int32)"
        self.arguments["t"] = "i32"
        return "t"

    def _reduce(self) -> None:
        self.arguments["partials"] = "*fp64"
        count, empty = len(self.values), "0.0" if self.by == "sum" else 'float("-inf")'
        for i, value in enumerate(self.values):
            x = self.where[value]
            masked = f"tl.where(inside, {x}, {empty}).to(tl.float64)"
            self.lines.append(f"tl.store(partials + block * {count} + {i}, tl.{self.by}({masked}))")

    # ------------------------------------------------------------------ around it

    def _pointers(self) -> list[str]:
        pointers = [
            f"{column.name}{suffix}" for column in self.touched for suffix in ("_at", "_scales")[: column.places]
        ]
        return [*pointers, *(SITE if self.draws else ())]

    def _tile(self, arguments: dict[str, str]) -> list[str]:
        head = [f"def {self.owner}_tile(block, row, start, count, {', '.join([*self._pointers(), *arguments])}):"]
        body = [
            f"line = tl.arange(0, {TILE // BLOCK})[:, None]",
            f"index = line * {BLOCK} + tl.arange(0, {BLOCK})[None, :]",
            "inside = index < count",
        ]
        if any(column.quantized for column in self.touched):
            body.append(f"there = line * {BLOCK} < count")
        for i, symbol in enumerate(self.per_tensor):
            name = self.where[symbol]
            body.append(f"{name} = tl.load(values + row * {len(self.per_tensor)} + {i})")
        notes = [f"# {name} is {symbol!r}" for name, symbol in self.numbers.items() if symbol.name != "host"]
        return ["@triton.jit", *head, *(f"    {line}" for line in [*notes, *body, *self.lines])]

    def _kernel(self, arguments: dict[str, str]) -> list[str]:
        passed = ", ".join([*self._pointers(), *arguments])
        integers = [word for word in arguments if word == "t" or word in self.integers]
        unspecialised = f"(do_not_specialize={integers})" if integers else ""
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
                kind = "uint8" if column.quantized else column.kind
                body.append(f"{column.name}_at = {self._address(place, kind)} + start")
                if column.quantized:
                    scales = "start // 128" if column.kind == "log" else "start // 256"
                    body.append(f"{column.name}_scales = {self._address(place + 1, 'float32')} + {scales}")
            if column.kind == "site" and self.draws:
                body += [f"{word} = tl.load(at + {place + i})" for i, word in enumerate(SITE)]
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
