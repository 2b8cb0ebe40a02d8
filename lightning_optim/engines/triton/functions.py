# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Functions that Triton's language lacks, and the sums of a launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lerp(a, b, weight):
    """a + weight * (b - a), from the nearer of the two ends and with one rounding, as in torch."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), b - a, tl.where(near, a, b))


@triton.jit
def power(a, b):
    """a ** b for a >= 0."""
    general = tl.where(b == 0.0, 1.0, tl.exp2(b * tl.log2(a)))
    return tl.where(b == 1.0, a, tl.where(b == 0.5, tl.sqrt_rn(a), general))


@triton.jit
def squarable(x):
    """0 where x is finite and above 2^50, else x."""
    return tl.where((tl.abs(x) > 1125899906842624.0) & (tl.abs(x) < float("inf")), 0.0, x)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def combine_tiles(partials, table, results, WIDTH: tl.constexpr, COUNT: tl.constexpr, MAXIMUM: tl.constexpr):
    """Combine the results of the tiles of each tensor, always in the same order. One instance for each result."""
    row = tl.program_id(0) // COUNT
    which = tl.program_id(0) % COUNT
    first = tl.load(table + row * WIDTH)
    last = tl.load(table + (row + 1) * WIDTH)
    empty = float("-inf") if MAXIMUM else 0.0
    found = tl.full((1024,), empty, tl.float64)
    for low in range(first, last, 1024):
        tile = low + tl.arange(0, 1024)
        part = tl.load(partials + tile * COUNT + which, mask=tile < last, other=empty)
        found = tl.maximum(found, part) if MAXIMUM else found + part
    result = tl.max(found, axis=0) if MAXIMUM else tl.sum(found, axis=0)
    tl.store(results + tl.program_id(0), result)
