"""Prints the passes of a program in C++.

A call of a kernel serves the tiles `first` to `last` of a launch. Where no operand is quantized and nothing is summed,
a tile is one loop over its elements, which a compiler turns into vector instructions. Otherwise the loop runs block by
block: codes are dequantized into buffers, the update runs on the buffers, and its results are quantized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_optim.engines.compiled import runs
from lightning_optim.engines.kernels import Kernel
from lightning_optim.engines.signature import Signature
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Kind, Symbol, is_element, is_statistic
from lightning_optim.language.values import By
from lightning_optim.storage.format import Constant
from lightning_optim.storage.quantized import BLOCK

TILE = 16 * BLOCK  # elements

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
    "squarable": "squarable({})",
    "sign": "sign({})",
    "maximum": "maximum({}, {})",
    "minimum": "minimum({}, {})",
    "lerp": "lerp({}, {}, {})",
    "where": "{} ? {} : {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
}
# Exponents for which roots are faster than logarithms. They are compared when a step begins.
ROOTS = {"0.5": "root(a)", "0.25": "root(root(a))"}
# The C++ type of each dtype, and the expressions that read and write an element of it.
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "uint16_t", torch.float16: "_Float16"}
READ = {torch.bfloat16: "from_bfloat16({})"}
WRITE = {torch.bfloat16: "to_bfloat16({})"}
ARGUMENTS = (
    "const float* const* codebooks, const int64_t* table, const int32_t* tiles, int64_t first, int64_t last, "
    "const double* numbers, const double* values, int64_t t, double* partials, const void* const* statistics, "
    "const int64_t* windows"
)


def print_pass(program: Program, signature: Signature, outputs: Sequence[str]) -> Kernel:
    """Print the pass that computes and stores the parameter and slots, or the buffers, named in `outputs`."""
    return _Printer(program, signature, [program.value(name) for name in outputs], outputs, "").kernel()


def print_reduction(program: Program, signature: Signature, of: Sequence[Symbol], by: By) -> Kernel:
    """Print a pass that stores, for each tile, the sum or the maximum of each of the symbols `of`."""
    return _Printer(program, signature, of, (), by).kernel()


def print_means(program: Program, signature: Signature, of: Sequence[Symbol]) -> Kernel:
    """Print a pass that adds the arguments of means along axes to sums in `partials`.

    For the tile and the mean, `windows` says where in `partials` the first number of the statistic is.
    """
    printer = _Printer(program, signature, list(dict.fromkeys(symbol.args[0] for symbol in of)), (), "mean")
    printer.means = of
    return printer.kernel()


class _Printer:
    """Prints the symbols that some values depend on, one line each."""

    def __init__(
        self, program: Program, signature: Signature, values: Sequence[Any], outputs: Sequence[str], by: str
    ) -> None:
        self.program, self.signature = program, signature
        self.values, self.outputs, self.by = values, outputs, by
        self.means: Sequence[Symbol] = ()
        self.elements = program.elements(values)
        self.words: dict[Symbol, str] = {}  # the variable that holds each symbol
        self.numbers: dict[str, Symbol] = {}
        self.per_tensor: list[Symbol] = []
        self.exponents: set[str] = set()
        self.loaded = signature.with_partners(filter(None, map(program.operand, self.elements)), outputs)
        self.touched = {*self.loaded, *outputs}
        self.formats = {name: form for name, form in signature.formats.items() if name in self.touched}
        self.codebooks = list(dict.fromkeys(form.codebook.name for form in self.formats.values() if form.codebook))
        self.normals = [symbol for symbol in self.elements if symbol.name == "normal"]
        self.statistics = {symbol: f"statistic{i}" for i, symbol in enumerate(program.statistics_of(values))}
        self.words.update({symbol: f"{word}_block[i]" for symbol, word in self.statistics.items()})
        self.by_blocks = bool(by or self.normals or self.formats or self.statistics)

    def kernel(self) -> Kernel:
        body = self._compute()
        inner = self._blocks(body) if self.by_blocks else self._loop(body, "count")
        count = len(self.per_tensor)
        per_tensor = [(self.words[symbol], i) for i, symbol in enumerate(self.per_tensor)]
        lines = [
            f"using T = {'double' if self.signature.dtypes.get('p') == torch.float64 else 'float'};",
            "",
            f'extern "C" void run({ARGUMENTS}) {{',
            *(f"    const T {name} = T(numbers[{i}]);" for i, name in enumerate(self.numbers)),
            *(f"    const float* {name} = codebooks[{i}];" for i, name in enumerate(self.codebooks)),
            *(f"    const T* {word} = (const T*)statistics[{i}];" for i, word in enumerate(self.statistics.values())),
            "    for (int64_t tile = first; tile < last; ++tile) {",
            "        const int64_t row = tiles[tile];",
            f"        const int64_t* at = table + row * {self.signature.width};",
            f"        const int64_t start = (tile - at[0]) * {TILE};",
            f"        const int64_t count = at[1] - start < {TILE} ? at[1] - start : {TILE};",
            *(f"        const T {word} = T(values[row * {count} + {i}]);" for word, i in per_tensor),
            *(f"        {line}" for line in (*self._pointers(), *inner)),
            "    }",
            "}",
            "",
        ]
        random = any(self.formats[name].stochastic for name in self.outputs if name in self.formats)
        return Kernel(
            name="run",
            text="\n".join(lines),
            arguments={**({"t": "int64"} if random else {}), **dict.fromkeys(self.codebooks, "float*")},
            numbers=self.numbers,
            integers={},
            values=tuple(self.per_tensor),
            sums=0 if self.outputs else len(self.means or self.values),
            by=self.by,
            statistics={word: symbol for symbol, word in self.statistics.items()},
            formats=tuple(dict.fromkeys(self.formats.values())),
        )

    # ------------------------------------------------------------------ memory

    def _pointers(self) -> list[str]:
        """Lines that declare pointers to the operands of this tile."""
        lines = []
        for name, stored in self.signature.operands:
            if name not in self.touched:
                continue
            offset, constant = self.signature.offsets[name], "" if name in self.outputs else "const "
            word = TYPES[stored] if isinstance(stored, torch.dtype) else "uint8_t"
            lines.append(f"{constant}{word}* __restrict {name}_at = ({constant}{word}*)at[{offset}] + start;")
            if name in self.formats:
                scales = f"start / {BLOCK} * {self.formats[name].scales_per_block}"
                lines.append(f"{constant}float* {name}_scales = ({constant}float*)at[{offset + 1}] + {scales};")
        if self.statistics or self.means:
            lines.append(f"const int64_t* sizes = at + {self.signature.offsets['layout']};")
        if self.normals:
            lines.append(f"const int64_t* global_index = at + {self.signature.offsets['index']};")
        return lines

    def _element(self, name: str) -> str:
        """The expression for an element of an operand in memory."""
        return f"{name}_at[{'block + i' if self.by_blocks else 'i'}]"

    def _load(self, name: str) -> str:
        if name in self.formats:
            return f"{name}_block[i]"
        return READ.get(self.signature.dtypes[name], "T({})").format(self._element(name))

    def _store(self, name: str, value: str) -> str:
        if name in self.formats:
            return f"{name}_block[i] = {value};"
        dtype = self.signature.dtypes[name]
        return f"{self._element(name)} = {WRITE.get(dtype, f'{TYPES[dtype]}({{}})').format(value)};"

    # ------------------------------------------------------------------ the loop over elements

    def _compute(self) -> list[str]:
        """The lines inside the loop over elements."""
        lines = []
        for symbol in self.elements:
            if symbol.name == "normal":
                for arg in symbol.args:
                    self._argument(arg)
                word = f"normal{self.normals.index(symbol)}_block[i]"
            elif operand := self.program.operand(symbol):
                word = f"old_{operand}"
                lines.append(f"const T {word} = {self._load(operand)};")
            else:
                word = f"x{len(self.words)}"
                kind = "bool" if symbol.name in ("gt", "ge") else "T"
                lines.append(f"const {kind} {word} = {self._expression(symbol)};")
            self.words[symbol] = word
        if self.outputs:
            pairs = zip(self.outputs, self.values, strict=True)
            return lines + [self._store(name, self.words[value]) for name, value in pairs]
        return lines + [f"sum{i}_block[i] = {self.words[value]};" for i, value in enumerate(self.values)]

    def _expression(self, symbol: Symbol) -> str:
        args = [self._argument(arg) for arg in symbol.args]
        if symbol.name == "div" and not _is_tensor(symbol.args[0]):  # torch divides a number by a tensor so
            return f"{args[0]} * (T(1) / {args[1]})"
        if symbol.name == "pow" and args[1] in self.numbers:
            self.exponents.add(args[1])
            return f"to_{args[1]}({args[0]})"
        return EXPRESSIONS[symbol.name].format(*args)

    def _argument(self, arg: Any) -> str:
        if not isinstance(arg, Symbol):
            number = float(arg)
            return f"T({number!r})" if math.isfinite(number) else f"T({'-' if number < 0 else ''}__builtin_inf())"
        if arg not in self.words:
            per_tensor = arg.kind == Kind.SCALAR
            self.words[arg] = f"of_tensor{len(self.per_tensor)}" if per_tensor else f"n{len(self.numbers)}"
            if per_tensor:
                self.per_tensor.append(arg)
            else:
                self.numbers[self.words[arg]] = arg
        return self.words[arg]

    def _loop(self, body: Sequence[str], count: str) -> list[str]:
        """A loop over elements, repeated for each way to compute powers, so that no element has to choose."""
        loop = [
            "#pragma GCC ivdep",
            f"for (int64_t i = 0; i < {count}; ++i) {{",
            *(f"    {line}" for line in body),
            "}",
        ]
        for name in sorted(self.exponents):
            choices = [(f"if ({name} == T({power})) ", root) for power, root in ROOTS.items()]
            loop = [
                line
                for condition, result in [*choices, ("", f"power(a, {name})")]
                for line in (
                    f"{condition}{{",
                    f"    const auto to_{name} = [=](T a) {{ return {result}; }};",
                    *(f"    {line}" for line in loop),
                    "} else" if condition else "}",
                )
            ]
        return loop

    # ------------------------------------------------------------------ block by block

    def _blocks(self, body: Sequence[str]) -> list[str]:
        """A loop over blocks, which fills buffers, runs the body on them and stores their results."""
        located, before = runs.spread(self.signature, self.program.axes, self.statistics)
        added, buffers, after = runs.add_up(self.signature, self.program.axes, self.means, self.values)
        before += buffers
        if self.by:  # passes that write as well gain nothing
            read = [name for name in self.loaded if name not in self.formats]
            fetched = [f"    fetch({name}_at + block + {TILE});" for name in read]
            before += [f"if (start + block + {TILE} < at[1]) {{", *fetched, "}"]
        for name in self.formats:
            self._buffer(name, before, after)
        for i, symbol in enumerate(self.normals):
            before.append(f"T normal{i}_block[{BLOCK}];")
            before.append(
                f"normal_block(normal{i}_block, inside, start + block, global_index, {self._counter(symbol)});"
            )
        sums = range(0 if self.outputs or self.means else len(self.values))
        combine, start = ("add_up", "0.0") if self.by == "sum" else ("take_largest", "-__builtin_inf()")
        for i in sums:
            before.append(f"T sum{i}_block[{BLOCK}];")
            before.append(f"for (int64_t i = inside; i < {BLOCK}; ++i) sum{i}_block[i] = T({start});")
            after.append(f"{combine}(lanes{i}, sum{i}_block);")
        return [
            *located,
            *added,
            *(f"double lanes{i}[LANES];" for i in sums),
            *(f"for (int64_t j = 0; j < LANES; ++j) lanes{i}[j] = {start};" for i in sums),
            f"for (int64_t block = 0; block < count; block += {BLOCK}) {{",
            f"    const int64_t inside = count - block < {BLOCK} ? count - block : {BLOCK};",
            *(f"    {line}" for line in (*before, *self._loop(body, "inside"), *after)),
            "}",
            *(line for i in sums for line in self._finish(i, len(sums))),
        ]

    def _buffer(self, name: str, before: list[str], after: list[str]) -> None:
        """Add the lines that dequantize a block of an operand before the body, and quantize it afterwards."""
        form = self.formats[name]
        scales = f"{name}_scales + block / {BLOCK} * {form.scales_per_block}"
        partner, random = f"{form.partner}_block", ("start + block", "t")
        args = [f"{name}_at + block", scales, f"{name}_block"]
        before.append(f"float {name}_block[{BLOCK}];")
        if name in self.loaded:
            extra = form.extra_arguments(partner, (), _constant)
            before.append(f"{form.name}_dequantize({', '.join(args + extra)});")
        if name in self.outputs:
            extra = form.extra_arguments(partner, random, _constant)
            before.append(f"for (int64_t i = inside; i < {BLOCK}; ++i) {name}_block[i] = 0.0f;")
            after.append(f"{form.name}_quantize({', '.join(args + extra)});")

    def _counter(self, symbol: Symbol) -> str:
        """Both halves of the seed and the step as integers, which a double holds exactly and a float does not."""
        names = list(self.numbers)
        return ", ".join(f"uint32_t(numbers[{names.index(self.words[arg])}])" for arg in symbol.args)

    def _finish(self, i: int, count: int) -> list[str]:
        """Lines that combine the lanes of a sum."""
        combine = f"total{i} + lanes{i}[j]" if self.by == "sum" else f"maximum(total{i}, lanes{i}[j])"
        return [
            f"double total{i} = lanes{i}[0];",
            f"for (int64_t j = 1; j < LANES; ++j) total{i} = {combine};",
            f"partials[tile * {count} + {i}] = total{i};",
        ]


def _is_tensor(value: Any) -> bool:
    """Whether torch computes with a tensor there."""
    return is_element(value) or is_statistic(value)


def _constant(value: Constant) -> str:
    """A constant of a format, in C++."""
    return str(value).lower() if isinstance(value, bool) else repr(value)
