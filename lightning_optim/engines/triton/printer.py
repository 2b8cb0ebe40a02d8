"""Prints the passes of a program in Triton.

An instance of a kernel serves one tile of a launch. The function of a tile is printed once and called in two branches:
in one of them the compiler can prove that the number of elements is a multiple of 8, and moves 16 bytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_optim.engines.kernels import Kernel
from lightning_optim.engines.signature import INDEX, Signature
from lightning_optim.engines.triton.spread import spread
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Kind, Symbol, is_element, is_statistic
from lightning_optim.language.values import By
from lightning_optim.storage.quantized import BLOCK

TILE = 4 * BLOCK  # elements: 8 for each of 128 threads, two accesses of 16 bytes in float32
WORD = 8  # consecutive elements with one mask: 16 bytes in half precision

EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "divide({}, {})",
    "pow": "power({}, {})",
    "neg": "-{}",
    "abs": "tl.abs({})",
    "sqrt": "square_root({})",
    "exp": "tl.exp({})",
    "squarable": "squarable({})",
    "sign": "sign({})",
    "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "lerp": "lerp({}, {}, {})",
    "where": "tl.where({}, {}, {})",
    "gt": "{} > {}",
    "ge": "{} >= {}",
}
ROUGHLY = {"div": "divide_roughly({}, {})", "sqrt": "rough_root({})"}  # at 8 bits, where instructions take the time
# The Triton type of each dtype, and the expressions that read and write an element of it.
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
READ = {torch.float32: "{}"}
WRITE = {torch.float32: "{}", torch.bfloat16: "to_bfloat16({})", torch.float16: "{}.to(tl.float16)"}
# Names that kernels use themselves, so that no argument may have them.
RESERVED = (
    *("table", "tiles", "values", "t", "partials"),
    *("tile", "row", "at", "start", "count", "block", "index", "inside", "there", "nan_outside"),
    *("layout", "picked", "offsets", "collected", "room", "into", "rest", "carry", "CACHING"),
    *("divide", "divide_by_number", "square_root", "power", "squarable", "sign", "lerp", "largest", "normal"),
    *("dither", "storable", "divide_roughly", "rough_root"),
)
INLINE = 60  # longer expressions get a line of their own


def print_pass(program: Program, signature: Signature, outputs: Sequence[str]) -> Kernel:
    """Print the pass that computes and stores the parameter and slots, or the buffers, named in `outputs`."""
    values = [program.value(name) for name in outputs]
    return _Printer(
        program, signature, values, outputs, "", "step" if set(outputs) <= program.outputs.keys() else "arguments"
    ).kernel()


def print_reduction(program: Program, signature: Signature, of: Sequence[Symbol], by: By) -> Kernel:
    """Print a pass that stores, for each tile, the sum or the maximum of each of the symbols `of`."""
    return _Printer(program, signature, of, (), by, f"{by}s").kernel()


def print_means(program: Program, signature: Signature, of: Sequence[Symbol]) -> Kernel:
    """Print a pass that writes the arguments of means along axes into a buffer, for the tiles `picked`."""
    values = list(dict.fromkeys(symbol.args[0] for symbol in of))
    return _Printer(program, signature, values, (), "mean", "values").kernel()


class _Printer:
    """Prints the symbols that some values depend on, each in its own line or inside the only line that reads it."""

    def __init__(
        self,
        program: Program,
        signature: Signature,
        values: Sequence[Any],
        outputs: Sequence[str],
        by: str,
        role: str,
    ) -> None:
        self.program, self.signature = program, signature
        self.values, self.outputs, self.by = values, outputs, by
        self.owner = _owner(program)
        self.name = f"{self.owner}_{role}"
        self.elements = program.elements(values)
        self.uses: dict[Symbol, int] = dict.fromkeys(values, 2)  # a result gets a line of its own
        computed = [symbol for symbol in self.elements if not program.operand(symbol)]
        for arg in (arg for symbol in computed for arg in symbol.args if isinstance(arg, Symbol)):
            self.uses[arg] = self.uses.get(arg, 0) + 1
        read = {symbol: name for symbol in self.elements if (name := program.operand(symbol))}
        self.loaded = signature.with_partners(read.values(), outputs)
        names = [name for name, _ in signature.operands]
        self.touched = signature.partners_first(name for name in names if name in self.loaded or name in outputs)
        self.expressions = EXPRESSIONS | (ROUGHLY if signature.formats.keys() & self.touched else {})
        self.words: dict[Symbol, str] = dict(read)
        self.numbers: dict[str, Symbol] = {}
        self.integers: dict[str, Symbol] = {}
        self.per_tensor: list[Symbol] = []
        self.statistics = {f"statistic_{i}": symbol for i, symbol in enumerate(program.statistics_of(values))}
        self.words.update({symbol: f"of_{word}" for word, symbol in self.statistics.items()})
        self.taken = {*names, *INDEX, *RESERVED, *self.statistics, *self.words.values()}
        self.arguments: dict[str, str] = {}
        self.lines: list[str] = []
        self.indexed = any(symbol.name == "normal" for symbol in self.elements)

    def kernel(self) -> Kernel:
        self.lines += [f"{name} = {self._load(name)}" for name in self.touched if name in self.loaded]
        self.arguments.update(dict.fromkeys(self.statistics, "*fp32"))
        self.lines += spread(self.signature, self.program.axes, self.statistics)
        self._compute()
        if self.outputs:
            self._store()
        elif self.by == "mean":
            self._collect()
        else:
            self._reduce()
        arguments = {
            **({"values": "*fp32"} if self.per_tensor else {}),
            **self.arguments,
            **dict.fromkeys(self.numbers, "fp32"),
        }
        formats = self.signature.formats
        return Kernel(
            name=self.name,
            text="\n".join([*self._tile(arguments), "", "", *self._entry(arguments), ""]),
            arguments=arguments,
            numbers=self.numbers,
            integers=self.integers,
            values=tuple(self.per_tensor),
            sums=0 if self.outputs else len(self.values),
            by=self.by,
            statistics=self.statistics,
            formats=tuple(dict.fromkeys(formats[name] for name in self.touched if name in formats)),
        )

    # ------------------------------------------------------------------ the tile

    def _load(self, name: str) -> str:
        """The expression that loads an operand."""
        if name in self.signature.formats:
            return self._call(name, "dequantize", [], self.signature.partner(name) or "", ())
        load = f"tl.load({name}_at + index, mask=inside, other=0.0)"
        return READ.get(self.signature.dtypes[name], "{}.to(tl.float32)").format(load)

    def _call(self, name: str, function: str, values: list[str], partner: str, random: Sequence[str]) -> str:
        """The call of a function of a format."""
        form = self.signature.formats[name]
        if form.codebook:
            self.arguments[form.codebook.name] = "*fp32"
        args = [f"{name}_at", f"{name}_scales", "index", "block", "there"]
        return f"{form.name}_{function}({', '.join([*args, *values, *form.extra_arguments(partner, random)])})"

    def _compute(self) -> None:
        results = dict(zip(self.values, (f"new_{name}" for name in self.outputs), strict=False))
        for symbol in self.elements:
            if symbol in self.words:  # it has been loaded
                continue
            if symbol.name == "normal":
                expression = self._normal(symbol)
            else:
                expression = self._expression(symbol, [self._argument(arg) for arg in symbol.args])
            if self.uses[symbol] == 1 and len(expression) < INLINE:
                self.words[symbol] = f"({expression})"
                continue
            word = results.get(symbol) or self._fresh("x")
            self.lines.append(f"{word} = {expression}")
            self.words[symbol] = word

    def _expression(self, symbol: Symbol, args: list[str]) -> str:
        if symbol.name == "div":
            number, divisor = (not (is_element(arg) or is_statistic(arg)) for arg in symbol.args)
            if number:  # torch divides a number by a tensor so
                return f"{args[0]} * {self.expressions['div'].format('1.0', args[1])}"
            if divisor:
                return f"divide_by_number({args[0]}, {args[1]})"
        if symbol.name == "where" and not is_element(symbol.args[0]):
            args[0] = f"{args[0]} != 0.0"
        return self.expressions[symbol.name].format(*args)

    def _normal(self, symbol: Symbol) -> str:
        """The call that computes normal numbers. Its seed and step are integers, which float32 could not hold."""
        names = []
        for arg, word in zip(symbol.args, ("seed_low", "seed_high", "normal_t"), strict=True):
            existing = next((name for name, other in self.integers.items() if other is arg), None)
            names.append(existing or self._fresh(f"{word}_"))
            self.integers[names[-1]] = arg
            self.arguments[names[-1]] = "i64"
        return f"normal({', '.join([*names, *INDEX])}, start + index)"

    def _fresh(self, stem: str) -> str:
        name = next(name for i in range(1 << 20) if (name := f"{stem}{i}") not in self.taken)
        self.taken.add(name)
        return name

    def _argument(self, arg: Any) -> str:
        if not isinstance(arg, Symbol):
            number = float(arg)
            return repr(number) if math.isfinite(number) else f'float("{number}")'
        if arg in self.words:
            return self.words[arg]
        if arg.kind == Kind.SCALAR:
            name = self._fresh("of_tensor_")
            self.per_tensor.append(arg)
        else:
            word = arg.args[0].replace(".", "_") if arg.name == "host" else ""
            name = word if word and word not in self.taken else self._fresh(f"{word}_" if word else "n")
            self.taken.add(name)
            self.numbers[name] = arg
        self.words[arg] = name
        return name

    def _store(self) -> None:
        """Store new values, those of partners first: others are quantized relative to them as they will be read."""
        stored_as: dict[str, str] = {}  # the expression for each value as it will be read
        new = dict(zip(self.outputs, self.values, strict=True))
        for name in self.signature.partners_first(self.outputs):
            value = self.words[new[name]]
            if name in self.signature.formats:
                given = f"storable({value}, nan_outside)"
                if not self.signature.formats[name].takes_nan:
                    given = f"tl.where({given} == {value}, {value}, 0.0)"
                partner = self.signature.partner(name) or ""
                random = [self._dither()] if self.signature.formats[name].stochastic else []
                stored_as[name] = f"kept_{name}"
                call = self._call(name, "quantize", [given], stored_as.get(partner, partner), random)
                self.lines.append(f"kept_{name} = {call}")
                continue
            dtype = self.signature.dtypes[name]
            stored = WRITE[dtype].format(value)
            stored_as[name] = READ.get(dtype, "{}.to(tl.float32)").format(stored)
            self.lines.append(f"tl.store({name}_at + index, {stored}, mask=inside{self._caching()})")

    def _caching(self) -> str:
        """How the stores of a kernel with normal numbers differ between its two branches: not in what they do.

        The compiler joins what follows `normal` in both, with narrow stores. Write-back, the default, parts them.
        """
        return ", cache_modifier=CACHING" if self.indexed else ""

    def _dither(self) -> str:
        """The call that computes dither for all elements of the tile.

        The step counter is an argument. Under `capturable` it is one of the values on the device.
        """
        if self.program.step_counter is None:
            self.arguments["t"] = "i32"
            return "dither(t, start, index)"
        return f"dither({self._argument(self.program.step_counter)}.to(tl.int32), start, index)"

    def _reduce(self) -> None:
        self.arguments["partials"] = "*fp64"
        count = len(self.values)
        function, empty = ("tl.sum", "0.0") if self.by == "sum" else ("largest", 'float("-inf")')
        for i, value in enumerate(self.values):
            masked = f"tl.where(inside, {self.words[value]}, {empty}).to(tl.float64)"
            self.lines.append(f"tl.store(partials + tile * {count} + {i}, {function}({masked}))")

    def _collect(self) -> None:
        """Write the values of the tile into the buffer `collected`, (values, room)."""
        self.arguments.update({"picked": "*i32", "offsets": "*i64", "collected": "*fp32", "room": "i64"})
        for i, value in enumerate(self.values):
            self.lines.append(f"tl.store(into + {i} * room + index, {self.words[value]}, mask=inside)")

    # ------------------------------------------------------------------ around it

    def _pointers(self) -> list[str]:
        suffixes = {name: ("_at", "_scales") if name in self.signature.formats else ("_at",) for name in self.touched}
        pointers = [f"{name}{suffix}" for name in self.touched for suffix in suffixes[name]]
        into = ["into"] if self.by == "mean" else []
        return [*pointers, *(INDEX if self.indexed else ()), *(["layout"] if self.statistics else []), *into]

    def _tile(self, arguments: dict[str, str]) -> list[str]:
        given = [*self._pointers(), *arguments, *(["CACHING: tl.constexpr"] if self.indexed else ())]
        head = [f"def {self.owner}_tile(tile, row, start, count, {', '.join(given)}):"]
        body = [
            f"block = tl.arange(0, {TILE // BLOCK})[:, None]",
            f"index = block * {BLOCK} + tl.arange(0, {BLOCK})[None, :]",
            "inside = index < count",
        ]
        if any(name in self.signature.formats for name in self.touched):
            body.append(f"there = block * {BLOCK} < count")
        if any(name in self.signature.formats for name in self.outputs):
            body.append("nan_outside = tl.where(inside, 0.0, float('nan'))")
        for i, symbol in enumerate(self.per_tensor):
            body.append(f"{self.words[symbol]} = tl.load(values + row * {len(self.per_tensor)} + {i})")
        notes = [f"# {name} is {symbol!r}" for name, symbol in self.numbers.items() if symbol.name != "host"]
        return ["@triton.jit", *head, *(f"    {line}" for line in [*notes, *body, *self.lines])]

    def _entry(self, arguments: dict[str, str]) -> list[str]:
        """The function that is launched. It reads its tile and the addresses from the table."""
        passed = ", ".join([*self._pointers(), *arguments])
        integers = [word for word in arguments if word == "t" or word in self.integers]
        whole, ragged = (", ''", ", '.wb'") if self.indexed else ("", "")
        unspecialised = f"(do_not_specialize={integers})" if integers else ""
        body = [
            f"tile = {'tl.load(picked + tl.program_id(0))' if self.by == 'mean' else 'tl.program_id(0)'}",
            "row = tl.load(tiles + tile)",
            f"at = table + row.to(tl.int64) * {self.signature.width}",
            f"start = (tile - tl.load(at)) * {TILE}",
            f"count = tl.minimum(tl.load(at + 1) - start, {TILE}).to(tl.int32)",
            *self._addresses(),
            f"if count % {WORD} == 0:",
            f"    {self.owner}_tile(tile, row, start, count // {WORD} * {WORD}, {passed}{whole})",
            "else:",
            f"    {self.owner}_tile(tile, row, start, count, {passed}{ragged})",
        ]
        head = f"def {self.name}({', '.join(['table', 'tiles', *arguments])}):"
        return [f"@triton.jit{unspecialised}", head, *(f"    {line}" for line in body)]

    def _addresses(self) -> list[str]:
        lines = []
        for name, stored in self.signature.operands:
            if name not in self.touched:
                continue
            offset = self.signature.offsets[name]
            element = TYPES[stored] if isinstance(stored, torch.dtype) else "uint8"
            lines.append(f"{name}_at = {self._address(name, offset, element)} + start")
            if not isinstance(stored, torch.dtype):
                scales = f"start // {BLOCK} * {stored.scales_per_block}"
                lines.append(f"{name}_scales = {self._address(name, offset + 1, 'float32')} + {scales}")
        if self.indexed:
            offset = self.signature.offsets["index"]
            lines += [f"{word} = tl.load(at + {offset + i})" for i, word in enumerate(INDEX)]
        if self.statistics:
            lines.append(f"layout = at + {self.signature.offsets['layout']}")
        if self.by == "mean":
            lines.append("into = collected + tl.load(offsets + tl.program_id(0))")
        return lines

    def _address(self, name: str, offset: int, element: str) -> str:
        pointer = f"tl.load(at + {offset}).to(tl.pointer_type(tl.{element}))"
        return f"tl.multiple_of({pointer}, 16)" if name in self.signature.aligned else pointer


def _owner(program: Program) -> str:
    """The word for a program in the names of its kernels: the name of the optimizer, if it has one."""
    owner = getattr(program.update, "__self__", None)
    word = getattr(owner, "name", None) or "stage"
    return str(word) if str(word).isidentifier() else "update"
