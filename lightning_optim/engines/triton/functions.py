# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Functions that Triton's language lacks, and the sums of a launch."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_optim.storage.triton import INTERPRETED


@triton.jit
def reciprocal(x):
    """1 / x to a unit in the last place, for 2^-126 <= |x| <= 2^126, 0 and infinity."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x) to two units in the last place, for x >= 2^-126, 0 and infinity; not a number below 0."""
    return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def full_range_reciprocal(x):
    """1 / x to a unit in the last place for any x. It takes some more instructions."""
    return tl.inline_asm_elementwise("rcp.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def approximate_root(x):
    """sqrt(x) to a unit in the last place for any x."""
    return tl.inline_asm_elementwise("sqrt.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def divide(a, b):
    """a / b. Unlike the division of CUDA it does not branch, so that those of several elements overlap.

    It is rounded correctly where |a| is at least 2^-102, and else to a unit in the last place.
    """
    if INTERPRETED:
        result = tl.div_rn(a, b)
    else:
        small = tl.abs(b) < 2.0**-100  # so that no reciprocal is infinite; a that overflows had an infinite quotient
        a, b = tl.where(small, a * 2.0**32, a), tl.where(small, b * 2.0**32, b)
        near = reciprocal(b * 0.25) * 0.25  # large divisors have a reciprocal, too
        inverse = _refined(b, near)
        quotient = a * inverse
        corrected = tl.fma(tl.fma(b, quotient, a * -1.0), inverse * -1.0, quotient)
        # It is not a number if b is 0 or infinite, and if the quotient is infinite.
        result = tl.where(corrected == corrected, corrected, a * near)
    return result


@triton.jit
def divide_by_number(a, b):
    """a / b where b is one number for all elements: on a GPU times its reciprocal, as torch divides there."""
    if INTERPRETED:
        result = tl.div_rn(a, b)
    else:
        near = full_range_reciprocal(b)
        inverse = _refined(b, near)
        result = a * tl.where(inverse == inverse, inverse, near)
    return result


@triton.jit
def _refined(b, near):
    """The reciprocal of b, rounded correctly, from one that is near; not a number if b is 0 or infinite."""
    # `x * -1.0` becomes a sign of an operand, while `-x` is 0.0 - x in Triton, an instruction of its own.
    return tl.fma(tl.fma(b * -1.0, near, 1.0), near, near)


@triton.jit
def divide_roughly(a, b):
    """a / b, on a GPU to two units in the last place."""
    return tl.div_rn(a, b) if INTERPRETED else a / b


@triton.jit
def rough_root(x):
    """sqrt(x), on a GPU to a unit in the last place."""
    return tl.sqrt_rn(x) if INTERPRETED else approximate_root(x)


@triton.jit
def square_root(x):
    """sqrt(x), rounded correctly, without a branch."""
    if INTERPRETED:
        result = tl.sqrt_rn(x)
    else:
        small = x < 2.0**-100
        scaled = tl.where(small, x * 2.0**64, x)
        inverse = reciprocal_root(scaled)
        near = scaled * inverse
        near = tl.fma(tl.fma(near * -1.0, near, scaled), inverse * 0.5, near)
        near = tl.where(small, near * 2.0**-32, near)
        result = tl.where((near != near) & (x >= 0.0), x, near)  # 0 and infinity
    return result


@triton.jit
def lerp(a, b, weight):
    """a + weight * (b - a), from the nearer of the two ends and with one rounding, as in torch."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), b - a, tl.where(near, a, b))


@triton.jit
def power(a, b):
    """a ** b for a >= 0."""
    general = tl.where(b == 0.0, 1.0, tl.exp2(b * tl.log2(a)))
    return tl.where(b == 1.0, a, tl.where(b == 0.5, square_root(a), general))


@triton.jit
def squarable(x):
    """0 where x is finite and above 2^50, else x."""
    return tl.where((tl.abs(x) > 1125899906842624.0) & (tl.abs(x) < float("inf")), 0.0, x)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def largest(x):
    """The largest of all elements; NaN where one of them is."""
    found = tl.max(tl.where(x == x, x, float("-inf")))
    return tl.where(tl.max((x != x).to(tl.int32)) > 0, float("nan"), found)


@triton.jit
def combine_tiles(partials, starts, results, COUNT: tl.constexpr, MAXIMUM: tl.constexpr, MOST: tl.constexpr):
    """Combine at most `MOST` consecutive results of tiles, always in the same order. One instance for each result."""
    row = tl.program_id(0) // COUNT
    which = tl.program_id(0) % COUNT
    first = tl.load(starts + row)
    last = tl.load(starts + row + 1)
    empty = float("-inf") if MAXIMUM else 0.0
    found = tl.full((1024,), empty, tl.float64)
    for low in tl.static_range(0, MOST, 1024):
        tile = first + low + tl.arange(0, 1024)
        part = tl.load(partials + tile * COUNT + which, mask=tile < last, other=empty)
        found = tl.where((part > found) | (part != part), part, found) if MAXIMUM else found + part
    result = largest(found) if MAXIMUM else tl.sum(found, axis=0)
    tl.store(results + tl.program_id(0), result)
