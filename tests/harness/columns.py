"""Which threads load and store the elements of a column in compiled code, read off Triton's own representation.

A kernel reads and writes columns in place, and its warps run at their own pace. So an element may be stored only by the
thread that has loaded it, or behind something for which threads wait for each other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

POINTER = re.compile(r"%(\S+) = (?:tt\.(?:addptr|splat|broadcast|expand_dims|bitcast)|ttg\.convert_layout) %([^\s,]+)")
ACCESS = re.compile(r"tt\.(load|store) %([^\s,]+).* : (tensor<[^>]*?!tt\.ptr<\w+>, .*>)$")
TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<\w+>|\w+), (#.*)>$")
Owner = tuple[int, int]  # a thread: its warp, and its lane in it


@dataclass(frozen=True)
class Access:
    """A load or a store of a tensor.

    Attributes:
        line: Where it stands.
        region: The regions around it, as the lines where they begin.
        tensor: The type of its pointers.
    """

    line: int
    region: tuple[int, ...]
    tensor: str


@dataclass
class Code:
    """The loads and stores of a function, by the pointer from which a column begins, and where its threads meet.

    Attributes:
        layouts: The layouts by name, as they are written.
        loads: The loads of each column.
        stores: The stores of each column.
        exchanges: Where threads of one warp wait for each other, with whether those of all warps do.
    """

    layouts: dict[str, str] = field(default_factory=dict)
    loads: dict[str, list[Access]] = field(default_factory=dict)
    stores: dict[str, list[Access]] = field(default_factory=dict)
    exchanges: list[tuple[int, tuple[int, ...], bool]] = field(default_factory=list)

    @classmethod
    def read(cls, text: str) -> Code:
        """Read a function in Triton's representation for GPUs (`.asm["ttgir"]` of a compiled kernel)."""
        code, bases, regions = cls(), dict[str, str](), list[int]()
        for number, raw in enumerate(text.splitlines()):
            line = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)$", "", raw.rstrip())
            if found := re.match(r"(#\w+) = (#ttg\..*)$", line):
                code.layouts[found[1]] = found[2]
            if line.lstrip().startswith("}"):
                regions.pop()
            if found := POINTER.search(line):
                bases[found[1]] = bases.get(found[2], found[2])
            if found := ACCESS.search(line):
                accesses = code.loads if found[1] == "load" else code.stores
                access = Access(number, tuple(regions), found[3])
                accesses.setdefault(bases.get(found[2], found[2]), []).append(access)
            if (meets := code._meets(line)) is not None:
                code.exchanges.append((number, tuple(regions), meets))
            if line.endswith("{"):
                regions.append(number)
        return code

    def _meets(self, line: str) -> bool | None:
        """Whether all warps wait for each other in an operation, or those of one warp; None where nobody does."""
        if found := re.search(r"ttg\.convert_layout %\S+ : (tensor<.*>) -> (tensor<.*>)$", line):
            before, after = (self.owners(kind) for kind in found.groups())
            return any({w for w, _ in y} - {w for w, _ in x} for x, y in zip(before, after, strict=True))
        return True if re.search(r"\b(gpu\.barrier|ttg\.barrier|ttg\.local_barrier)\b", line) else None

    def owners(self, tensor: str) -> list[list[Owner]]:
        """The threads that hold each element of a tensor, those of the lowest number first."""
        found = TENSOR.match(tensor)
        assert found, tensor
        shape = [int(size) for size in found[1].split("x")[:-1]]
        return owners(shape, self._layout(found[2]))

    def _layout(self, word: str) -> str:
        return re.sub(r"#(?!ttg)\w+", lambda name: self.layouts[name[0]], word)


def owners(shape: Sequence[int], layout: str) -> list[list[Owner]]:
    """The threads that hold each element of a tensor of this shape, under a blocked layout or a slice of one."""
    if found := re.match(r"#ttg\.slice<\{dim = (\d), parent = (.*)\}>$", layout):
        return owners([*shape[: int(found[1])], 1, *shape[int(found[1]) :]], found[2])
    found = re.match(r"#ttg\.blocked<\{(.*)\}>$", layout)
    assert found, f"a layout of another kind: {layout}"
    numbers = {word: [int(x) for x in values.split(",")] for word, values in re.findall(r"(\w+) = \[(.*?)\]", found[1])}
    lanes, warps, order = (numbers[x] for x in ("threadsPerWarp", "warpsPerCTA", "order"))
    holders: list[set[Owner]] = [set() for _ in range(math.prod(shape))]
    for warp, lane in itertools.product(range(math.prod(warps)), range(math.prod(lanes))):
        places = [
            _along(i, _place(warp, warps, order), _place(lane, lanes, order), numbers, n) for i, n in enumerate(shape)
        ]
        for place in itertools.product(*places):
            flat = 0
            for n, x in zip(shape, place, strict=True):
                flat = flat * n + x
            holders[flat].add((warp, lane))
    return [sorted(of_element) for of_element in holders]


def _place(index: int, counts: Sequence[int], order: Sequence[int]) -> list[int]:
    """The position of a warp or a lane along each axis; the first axis of the order runs fastest."""
    found = [0] * len(counts)
    for axis in order:
        index, found[axis] = divmod(index, counts[axis])
    return found


def _along(axis: int, warp: list[int], lane: list[int], numbers: dict[str, list[int]], length: int) -> set[int]:
    """The elements along an axis that a thread holds."""
    size, lanes, warps = (numbers[x][axis] for x in ("sizePerThread", "threadsPerWarp", "warpsPerCTA"))
    first = (warp[axis] * lanes + lane[axis]) * size
    every = range(first, max(length, first + size), size * lanes * warps)
    return {(begin + i) % length for begin in every for i in range(size)}


def races(ttgir: str) -> Iterator[str]:
    """The columns that may be stored by one thread before another has loaded them, in words."""
    code = Code.read(ttgir)
    for column in code.loads.keys() & code.stores.keys():
        for load, store in itertools.product(code.loads[column], code.stores[column]):
            if load.line > store.line or store.region[: len(load.region)] != load.region:
                continue
            between = [
                across
                for line, region, across in code.exchanges
                if load.line < line < store.line and store.region[: len(region)] == region
            ]
            loaders, storers = code.owners(load.tensor), code.owners(store.tensor)
            if len(loaders) != len(storers):
                yield f"{column} is loaded as {load.tensor} and stored as {store.tensor}"
                continue
            others = [{*mine} - {storer[0]} for mine, storer in zip(loaders, storers, strict=True)]
            warps = any(w != storer[0][0] for of, storer in zip(others, storers, strict=True) for w, _ in of)
            if (warps and not any(between)) or (any(others) and not between and load.tensor != store.tensor):
                yield f"{column} is stored by other threads than have loaded it: {load.tensor}, {store.tensor}"


def stored_elsewhere(ttgir: str) -> list[str]:
    """The columns that are stored by another warp than has loaded them, behind a barrier or not."""
    code, found = Code.read(ttgir), dict[str, Any]()
    for column in code.loads.keys() & code.stores.keys():
        loaders, storers = (code.owners(x[0].tensor) for x in (code.loads[column], code.stores[column]))
        if any({w for w, _ in mine} - {storer[0][0]} for mine, storer in zip(loaders, storers, strict=True)):
            found[column] = None
    return sorted(found)
