"""Prints how a block reads statistics and is added up towards them: run by run, through buffers.

A run is elements that are neighbours along the innermost axis of a layout. An index goes along with the blocks of a
tile, so that only its first element is located by division.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.engines.signature import Signature
from lightning_optim.language.symbols import Symbol
from lightning_optim.storage.quantized import BLOCK

Kinds = Sequence[frozenset[Any]]  # the reduced axes of each kind of statistic


def spread(signature: Signature, kinds: Kinds, statistics: Mapping[Symbol, str]) -> tuple[list[str], list[str]]:
    """Lines that fill a buffer with the numbers of each statistic: before the blocks of a tile, and in each block.

    Args:
        signature: The signature of the launch.
        kinds: The kinds of statistics in its layouts.
        statistics: The name of the pointer to each statistic.
    """
    if not statistics:
        return [], []
    calls = []
    for symbol, word in statistics.items():
        start = signature.start(kinds.index(symbol.axes))
        offset = f"at[{start}] + offset<{signature.axes}>(reading, at + {start + 1})"
        numbers, stride = f"{word} + {offset}", f"at[{start + signature.axes}]"
        calls.append(f"{word}_block = spread({word}_buffer, {numbers}, {stride}, i, run, inside);")
    buffers = [
        line
        for word in statistics.values()
        for line in (f"T {word}_buffer[{BLOCK}];", f"const T* {word}_block = {word}_buffer;")
    ]
    return _located("reading", signature.axes), [*buffers, *_runs("reading", signature.axes, calls)]


def add_up(
    signature: Signature, kinds: Kinds, means: Sequence[Symbol], values: Sequence[Symbol]
) -> tuple[list[str], list[str], list[str]]:
    """Lines that add buffers to sums: before the blocks of a tile, before the loop over a block, and after it.

    Args:
        signature: The signature of the launch.
        kinds: The kinds of statistics in its layouts.
        means: The means to which the sums belong.
        values: Their arguments. Number i of them is in the buffer `sum{i}_block` when the loop has run.
    """
    if not means:
        return [], [], []
    targets: list[list[str]] = [[] for _ in values]  # the sums towards which each value is added
    for i, symbol in enumerate(means):
        start = signature.start(kinds.index(symbol.axes))
        offset = f"windows[tile * {len(means)} + {i}] + offset<{signature.axes}>(adding, at + {start + 1})"
        targets[values.index(symbol.args[0])].append(f"partials + {offset}, at[{start + signature.axes}]")
    calls = [
        f"add_towards({', '.join(of_value[first : first + 2])}, sum{i}_block + i, run);"
        for i, of_value in enumerate(targets)
        for first in range(0, len(of_value), 2)
    ]
    buffers = [f"T sum{i}_block[{BLOCK}];" for i in range(len(values))]
    return _located("adding", signature.axes), buffers, _runs("adding", signature.axes, calls)


def _located(index: str, axes: int) -> list[str]:
    return [f"int64_t {index}[{axes}];", f"locate<{axes}>({index}, start, sizes);"]


def _runs(index: str, axes: int, calls: Sequence[str]) -> list[str]:
    """A loop over the runs of a block."""
    return [
        "for (int64_t i = 0, run = 0; i < inside; i += run) {",
        f"    run = run_of<{axes}>({index}, sizes, inside - i);",
        *(f"    {call}" for call in calls),
        f"    advance<{axes}>({index}, run, sizes);",
        "}",
    ]
