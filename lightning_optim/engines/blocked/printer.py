"""Prints the passes of a program as a sequence of in-place torch calls.

Every call writes into a buffer that exists already (`lerp(m, g, c0, out=m)`): the buffer of an operand, or a scratch
buffer, which is free again after its last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_optim.language.math import FUNCTIONS
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol, is_element, is_statistic

# How many of the first arguments must be tensors.
TENSORS = {"add": 1, "mul": 1, "sub": 1, "div": 1, "lerp": 2, "gt": 1, "ge": 1, "where": 3}


@dataclass(frozen=True)
class Code:
    """A pass as Python code.

    Attributes:
        run: A function of the views (inputs, then scratch buffers) and the numbers. It returns the values that the code
            computes, or nothing if it writes them into buffers.
        inputs: Names of the buffers that it reads or writes, in the order of the views.
        written: Names of the buffers that it writes.
        scratch: The number of scratch buffers of the compute dtype, and of bools.
        numbers: The symbols whose values it takes, in order.
        normals: The inputs that hold normal numbers, by name.
        statistics: The inputs that hold statistics, by name.
        text: The source code.
    """

    run: Callable[[Sequence[Tensor], Sequence[float]], Sequence[Tensor]]
    inputs: tuple[str, ...]
    written: tuple[str, ...]
    scratch: tuple[int, int]
    numbers: tuple[Symbol, ...]
    normals: dict[str, Symbol]
    statistics: dict[str, Symbol]
    text: str


# Weak keys: a program refers to its optimizer, and so to the model. A cache must not keep these alive.
_codes: WeakKeyDictionary[Program, dict[tuple[tuple[Any, ...], tuple[str, ...]], Code]] = WeakKeyDictionary()


def code_of(program: Program, values: tuple[Any, ...], outputs: tuple[str, ...] = ()) -> Code:
    """The code that computes some values, printed at its first use.

    Args:
        program: The program.
        values: Symbols with one number per element.
        outputs: The operands into which the values are written. Without any, the code returns the values.
    """
    codes = _codes.setdefault(program, {})
    if (values, outputs) not in codes:  # symbols compare by identity
        codes[values, outputs] = _Printer(program, values, outputs).code()
    return codes[values, outputs]


class _Printer:
    """Prints the symbols that some values depend on.

    The new value of a slot is computed in the buffer of the slot unless a later line reads the old value.
    """

    def __init__(self, program: Program, values: tuple[Any, ...], outputs: tuple[str, ...]) -> None:
        self.values, self.outputs = values, outputs
        elements = program.elements(values)
        self.words: dict[Symbol, str] = {
            s: name for s in elements if (name := program.operand(s))
        }  # the buffer of each
        self.order = [symbol for symbol in elements if symbol.name != "normal" and symbol not in self.words]
        self.normals = {f"normal{i}": s for i, s in enumerate(s for s in elements if s.name == "normal")}
        self.statistics = {f"statistic{i}": symbol for i, symbol in enumerate(program.statistics_of(values))}
        self.inputs = list(self.words.values())
        self.inputs += [name for name in (*outputs, *self.normals, *self.statistics) if name not in self.inputs]
        self.words.update({symbol: name for name, symbol in (*self.normals.items(), *self.statistics.items())})
        self.numbers: dict[Symbol, str] = {}
        self.lines: list[str] = []
        self.free: dict[str, list[str]] = {"t": [], "b": []}
        self.scratch: dict[str, list[str]] = {"t": [], "b": []}
        self.last: dict[Symbol, int] = {}  # the position of the last reader
        for position, symbol in enumerate(self.order):
            self.last.update({arg: position for arg in symbol.args if isinstance(arg, Symbol)})
        self.last.update({value: len(self.order) for value in values})

    def code(self) -> Code:
        homes = self._homes()
        for position, symbol in enumerate(self.order):
            args = [self._argument(arg) for arg in symbol.args]
            self._free_read(symbol, position)
            if symbol.name == "squarable":
                self._print_squarable(symbol, args[0])
                continue
            target = homes.get(symbol) or self._buffer("b" if symbol.name in ("gt", "ge") else "t")
            self.words[symbol] = target
            self._print(symbol.name, symbol.args, args, target)
        self._move()
        result = "()" if self.outputs else _tuple(self.words[value] for value in self.values)
        views = _tuple([*self.inputs, *self.scratch["t"], *self.scratch["b"]])
        head = ["def run(views, numbers):", f"    {views} = views"]
        head += [f"    {_tuple(self.numbers.values())} = numbers"] if self.numbers else []
        text = "\n".join([*head, *(f"    {line}" for line in self.lines), f"    return {result}", ""])
        scope: dict[str, Any] = {"torch": torch, **{name: f.tensor for name, f in FUNCTIONS.items()}}
        exec(text, scope)  # the code consists of our own symbols only
        counts = (len(self.scratch["t"]), len(self.scratch["b"]))
        written = tuple(dict.fromkeys(self.outputs))
        named = (self.normals, self.statistics)
        return Code(scope["run"], tuple(self.inputs), written, counts, tuple(self.numbers), *named, text)

    def _homes(self) -> dict[Symbol, str]:
        """For each value that may be computed in the buffer of its output, that buffer."""
        homes: dict[Symbol, str] = {}
        old = {word: symbol for symbol, word in self.words.items()}
        for out, value in zip(self.outputs, self.values, strict=False):
            if value in self.words or value in homes:
                continue  # an input that moves to another slot, or a value that two slots share
            before = old.get(out)
            if before is None or self.last.get(before, -1) <= self.order.index(value):
                homes[value] = out
        return homes

    def _buffer(self, kind: str) -> str:
        """A free scratch buffer, "t" of the compute dtype or "b" of bools."""
        if self.free[kind]:
            return self.free[kind].pop()
        self.scratch[kind].append(f"{kind}{len(self.scratch[kind])}")
        return self.scratch[kind][-1]

    def _free_read(self, symbol: Symbol, position: int) -> None:
        """Free the scratch buffers whose last reader is this symbol."""
        for arg in dict.fromkeys(arg for arg in symbol.args if _is_tensor(arg)):
            for kind, buffers in self.scratch.items():
                if self.last[arg] == position and self.words[arg] in buffers:
                    self.free[kind].append(self.words[arg])

    def _move(self) -> None:
        """Copy values that were not computed in the buffer of their output into it."""
        pairs = ((out, self.words[value]) for out, value in zip(self.outputs, self.values, strict=False))
        moves = [(target, source) for target, source in pairs if target != source]
        # Save the value of a buffer that is both source and target.
        for source in dict.fromkeys(source for _, source in moves if any(source == target for target, _ in moves)):
            keep = self._buffer("t")
            self.lines.append(f"{keep}.copy_({source})")
            moves = [(target, keep if other == source else other) for target, other in moves]
        self.lines += [f"{target}.copy_({source})" for target, source in moves]

    def _argument(self, arg: Any) -> str:
        if _is_tensor(arg):
            return self.words[arg]
        if isinstance(arg, Symbol):
            return self.numbers.setdefault(arg, f"n{len(self.numbers)}")
        return repr(float(arg)) if isinstance(arg, int | float) else repr(arg)

    def _print_squarable(self, symbol: Symbol, arg: str) -> None:
        """Print the call for gradients: nearly always it returns its argument, and the buffer is not touched."""
        word = f"{arg}_{len(self.lines)}"  # a name of its own: nobody writes into it, and its buffer stays taken
        self.lines.append(f"{word} = squarable({arg}, out={self._buffer('t')})")
        self.words[symbol] = word

    def _print(self, name: str, symbols: Sequence[Any], args: list[str], target: str) -> None:
        """Print the torch call that computes a symbol into `target`."""
        is_tensor = [_is_tensor(symbol) for symbol in symbols]
        if name == "where" and is_statistic(symbols[0]):
            args[0] = f"({args[0]} != 0)"  # it lies in a buffer of numbers
        like = next(arg for arg, tensor in zip(args, is_tensor, strict=True) if tensor)
        if name in ("add", "mul") and not is_tensor[0]:
            args, is_tensor = args[::-1], is_tensor[::-1]
        if name in ("maximum", "minimum") and not all(is_tensor):
            tensor, number = (args[0], args[1]) if is_tensor[0] else (args[1], args[0])
            bound = "min" if name == "maximum" else "max"
            self.lines.append(f"torch.clamp({tensor}, {bound}={number}, out={target})")
            return
        for i in range(min(TENSORS.get(name, 0), len(args))):
            if not is_tensor[i]:
                args[i] = f"{target if like in self.scratch['b'] else like}.new_tensor({args[i]})"
        self.lines.append(f"{name}({', '.join(args)}, out={target})")


def _is_tensor(value: Any) -> bool:
    """Whether a value lies in a buffer of the block."""
    return is_element(value) or is_statistic(value)


def _tuple(words: Any) -> str:
    return f"({''.join(f'{word}, ' for word in words)})"
