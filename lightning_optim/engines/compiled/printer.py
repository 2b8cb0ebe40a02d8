"""The text of a kernel in C++, printed from the graph of an update.

A kernel serves the blocks `first` to `last` of a table (`layout.py`). Where neither codes nor sums are concerned a
block is one loop over its elements, which a compiler turns into vector instructions; else a block is taken line by
line, a line being the elements that share scales: codes are dequantized into a buffer, the update runs on buffers, and
what it made of them is quantized.
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

TILE = 16 * BLOCK  # elements of a block of the table

EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "pow": "power({}, {})",
    "neg": "-{}",
    "abs": "absolute({})",
    "sqrt": "root({})",
    "exp": "exponential({})",
    "sign": "sign({})",
    "maximum": "maximum({}, {})",
    "minimum": "minimum({}, {})",
    "lerp": "lerp({}, {}, {})",
    "where": "{} ? {} : {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
}
# Powers that are known when a step begins, for which roots are faster than logarithms.
ROOTS = {"0.5": "root(a)", "0.25": "root(root(a))"}
TYPES = {"float32": "float", "float64": "double", "bfloat16": "uint16_t", "float16": "_Float16"}
ARGUMENTS = (
    "const int64_t* table, const int32_t* blocks, int64_t first, int64_t last, const double* numbers, "
    "const double* values, int64_t t, double* partials, const float* signed_codebook, const float* unsigned_codebook"
)


def write_text(program: Program, outputs: Sequence[str], layout: Layout) -> Text:
    """The last pass: computes and stores the parameter and slots named in `outputs`."""
    return _Printer(program, layout, [program.outputs[name] for name in outputs], outputs, "").text()


def reduce_text(program: Program, of: Sequence[Symbol], by: str, layout: Layout) -> Text:
    """A pass that stores, for each block, the sum or the maximum of each of some symbols."""
    return _Printer(program, layout, of, (), by).text()


class _Printer:
    """Prints the symbols that some values depend on, one line each."""

    def __init__(
        self, program: Program, layout: Layout, values: Sequence[Symbol], outputs: Sequence[str], by: str
    ) -> None:
        self.program, self.layout, self.values, self.outputs, self.by = program, layout, values, outputs, by
        self.column = {column.name: column for column in layout.columns}
        self.needed = _needed(values)
        self.where: dict[Symbol, str] = {}
        self.numbers: dict[str, Symbol] = {}
        self.per_tensor: list[Symbol] = []
        self.exponents: set[str] = set()
        reads = {symbol.args[0] for symbol in self.needed if symbol.name == "element"}
        reads |= {self.column[name].partner or name for name in reads}  # codes are read with their partner
        reads |= {partner for name in outputs if (partner := self.column[name].partner) and partner not in outputs}
        self.reads = reads
        self.touched = [column for column in layout.columns if column.name in self.reads or column.name in outputs]
        self.draws = [symbol for symbol in program.normals if symbol in self.needed]
        self.by_lines = bool(by) or bool(self.draws) or any(column.quantized for column in self.touched)

    def text(self) -> Text:
        body = self._compute()
        inner = self._lines(body) if self.by_lines else self._loop(body, "count")
        parts = [
            f"using T = {'double' if self.column['p'].kind == 'float64' else 'float'};",
            "",
            f'extern "C" void run({ARGUMENTS}) {{',
            *(f"    const T {name} = T(numbers[{i}]);" for i, name in enumerate(self.numbers)),
            "    for (int64_t block = first; block < last; ++block) {",
            "        const int64_t row = blocks[block];",
            f"        const int64_t* at = table + row * {self.layout.width};",
            f"        const int64_t start = (block - at[0]) * {TILE};",
            f"        const int64_t count = at[1] - start < {TILE} ? at[1] - start : {TILE};",
            *(
                f"        const T {self.where[symbol]} = T(values[row * {len(self.per_tensor)} + {i}]);"
                for i, symbol in enumerate(self.per_tensor)
            ),
            *(f"        {line}" for line in (*self._pointers(), *inner)),
            "    }",
            "}",
            "",
        ]
        sums = 0 if self.outputs else len(self.values)
        kinds = {"t": "int64"} if any(self.column[name].kind == "log" for name in self.outputs) else {}
        codebooks = {column.codebook: "float*" for column in self.touched if column.kind == "dynamic"}
        text = "\n".join(parts)
        return Text("run", text, {**kinds, **codebooks}, self.numbers, {}, tuple(self.per_tensor), sums, self.by)

    # ------------------------------------------------------------------ memory

    def _pointers(self) -> list[str]:
        found, place = [], 2
        for column in self.layout.columns:
            if column in self.touched:
                constant = "" if column.name in self.outputs else "const "
                kind = "uint8_t" if column.quantized else TYPES[column.kind]
                pointer = f"{constant}{kind}* __restrict"
                found.append(f"{pointer} {column.name}_at = ({constant}{kind}*)at[{place}] + start;")
                if column.quantized:
                    scales = "start / 128" if column.kind == "log" else f"start / {BLOCK}"
                    found.append(
                        f"{constant}float* {column.name}_scales = ({constant}float*)at[{place + 1}] + {scales};"
                    )
            if column.kind == "site" and self.draws:
                found.append(f"const int64_t* site = at + {place};")
            place += column.places
        return found

    def _load(self, column: Column) -> str:
        if column.quantized:
            return f"{column.name}_line[i]"
        at = f"{column.name}_at[{'line + i' if self.by_lines else 'i'}]"
        return f"from_bfloat16({at})" if column.kind == "bfloat16" else f"T({at})"

    def _store(self, column: Column, value: str) -> str:
        if column.quantized:
            return f"{column.name}_line[i] = {value};"
        at = f"{column.name}_at[{'line + i' if self.by_lines else 'i'}]"
        value = f"to_bfloat16({value})" if column.kind == "bfloat16" else f"{TYPES[column.kind]}({value})"
        return f"{at} = {value};"

    # ------------------------------------------------------------------ the loop over elements

    def _compute(self) -> list[str]:
        lines = []
        for symbol in self.program.symbols:
            if symbol not in self.needed or symbol.kind != Kind.ELEMENT:
                continue
            if symbol.name == "normal":
                for arg in symbol.args:
                    self._argument(arg)
                name = f"normal{self.draws.index(symbol)}_line[i]"
            elif symbol.name == "element":
                name = f"old_{symbol.args[0]}"
                lines.append(f"const T {name} = {self._load(self.column[symbol.args[0]])};")
            else:
                name = f"x{len(self.where)}"
                kind = "bool" if symbol.name in ("gt", "ge") else "T"
                lines.append(f"const {kind} {name} = {self._expression(symbol)};")
            self.where[symbol] = name
        if self.outputs:
            pairs = zip(self.outputs, self.values, strict=True)
            return lines + [self._store(self.column[name], self.where[value]) for name, value in pairs]
        return lines + [f"sum_line{i}[i] = {self.where[value]};" for i, value in enumerate(self.values)]

    def _expression(self, symbol: Symbol) -> str:
        args = [self._argument(arg) for arg in symbol.args]
        if symbol.name == "div" and not _is_element(symbol.args[0]):  # as torch divides a number: by the reciprocal
            return f"{args[0]} * (T(1) / {args[1]})"
        if symbol.name == "pow" and args[1] in self.numbers:
            self.exponents.add(args[1])
            return f"to_{args[1]}({args[0]})"
        return EXPRESSIONS[symbol.name].format(*args)

    def _argument(self, arg: Any) -> str:
        if not isinstance(arg, Symbol):
            number = float(arg)
            return f"T({number!r})" if math.isfinite(number) else f"T({'-' if number < 0 else ''}__builtin_inf())"
        if arg not in self.where:
            per_tensor = arg.kind == Kind.SCALAR
            self.where[arg] = f"of_tensor{len(self.per_tensor)}" if per_tensor else f"n{len(self.numbers)}"
            if per_tensor:
                self.per_tensor.append(arg)
            else:
                self.numbers[self.where[arg]] = arg
        return self.where[arg]

    def _loop(self, body: Sequence[str], count: str) -> list[str]:
        """A loop over elements, one for each way in which powers are taken: no element has to ask."""
        loop = [
            "#pragma GCC ivdep",
            f"for (int64_t i = 0; i < {count}; ++i) {{",
            *(f"    {line}" for line in body),
            "}",
        ]
        for name in sorted(self.exponents):
            ways = [(f"if ({name} == T({power})) ", root) for power, root in ROOTS.items()]
            loop = [
                line
                for condition, way in [*ways, ("", f"power(a, {name})")]
                for line in (
                    f"{condition}{{",
                    f"    const auto to_{name} = [=](T a) {{ return {way}; }};",
                    *(f"    {line}" for line in loop),
                    "} else" if condition else "}",
                )
            ]
        return loop

    # ------------------------------------------------------------------ line by line

    def _lines(self, body: Sequence[str]) -> list[str]:
        quantized = sorted((c for c in self.touched if c.quantized), key=lambda column: column.partner is not None)
        empty = "T(0)" if self.by == "sum" else "-T(__builtin_inf())"
        before, after = [], []
        for column in quantized:
            before.append(f"float {column.name}_line[{BLOCK}];")
            if column.name in self.reads:
                before.append(f"{column.kind}_dequantize({self._codes(column)}{self._company(column)});")
            if column.name in self.outputs:
                last = ", start + line, t" if column.kind == "log" else self._company(column)
                last += f", {str(column.signed).lower()}" if column.kind == "dynamic" else ""
                before.append(f"for (int64_t i = inside; i < {BLOCK}; ++i) {column.name}_line[i] = 0.0f;")
                after.append(f"{column.kind}_quantize({self._codes(column)}{last});")
        for i, symbol in enumerate(self.draws):
            before.append(f"T normal{i}_line[{BLOCK}];")
            before.append(f"normal_line(normal{i}_line, inside, start + line, site, {self._counter(symbol)});")
        adds = "add_up" if self.by == "sum" else "take_largest"
        lanes = []
        for i in range(0 if self.outputs else len(self.values)):
            before += [
                f"T sum_line{i}[{BLOCK}];",
                f"for (int64_t i = inside; i < {BLOCK}; ++i) sum_line{i}[i] = {empty};",
            ]
            after.append(f"{adds}(lanes{i}, sum_line{i});")
            lanes.append(i)
        start = "0.0" if self.by == "sum" else "-__builtin_inf()"
        return [
            *(f"double lanes{i}[LANES];" for i in lanes),
            *(f"for (int64_t j = 0; j < LANES; ++j) lanes{i}[j] = {start};" for i in lanes),
            f"for (int64_t line = 0; line < count; line += {BLOCK}) {{",
            f"    const int64_t inside = count - line < {BLOCK} ? count - line : {BLOCK};",
            *(f"    {line}" for line in (*before, *self._loop(body, "inside"), *after)),
            "}",
            *(line for i in lanes for line in self._finish(i, len(lanes))),
        ]

    def _codes(self, column: Column) -> str:
        step = f"line / {BLOCK // 2}" if column.kind == "log" else f"line / {BLOCK}"
        return f"{column.name}_at + line, {column.name}_scales + {step}, {column.name}_line"

    def _counter(self, symbol: Symbol) -> str:
        """Both halves of the seed, and the step: whole numbers, which double holds and float would not."""
        names = list(self.numbers)
        return ", ".join(f"uint32_t(numbers[{names.index(self.where[arg])}])" for arg in symbol.args)

    def _company(self, column: Column) -> str:
        """What a format needs besides codes and scales."""
        return (
            f", {column.codebook}" if column.kind == "dynamic" else f", {column.partner}_line" if column.partner else ""
        )

    def _finish(self, i: int, count: int) -> list[str]:
        combine = "total + lanes{i}[j]" if self.by == "sum" else "maximum(total, lanes{i}[j])"
        return [
            f"double total{i} = lanes{i}[0];",
            f"for (int64_t j = 1; j < LANES; ++j) total{i} = {combine.replace('total', f'total{i}').format(i=i)};",
            f"partials[block * {count} + {i}] = total{i};",
        ]


def _needed(values: Sequence[Symbol]) -> set[Symbol]:
    """The symbols that must be computed element by element."""
    found: set[Symbol] = set()
    waiting = list(values)
    while waiting:
        symbol = waiting.pop()
        if symbol not in found and symbol.kind == Kind.ELEMENT:
            found.add(symbol)
            waiting += [arg for arg in symbol.args if isinstance(arg, Symbol)]
    return found


def _is_element(value: Any) -> bool:
    return isinstance(value, Symbol) and value.kind == Kind.ELEMENT
