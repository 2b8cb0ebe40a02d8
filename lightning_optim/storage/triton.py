# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Triton functions that several formats call.

Only the Triton engine imports this module and those of the formats, when it runs for the first time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """The nearest integer, ties to even, as a float, for 0 <= x < 2**31."""
    small = (x + 8388608.0) - 8388608.0  # from 2**23 on, float32 holds only integers
    return tl.where(x < 8388608.0, small, x)


# Triton before 3.4 has no other way to tell whether the interpreter runs.
INTERPRETED = tl.constexpr(not isinstance(nearest, triton.JITFunction))


@triton.jit
def to_bfloat16(x):
    """The nearest bfloat16, ties to even. The interpreter would truncate, so there the bits are rounded."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        upward = (((bits.to(tl.int64) + 0x7FFF + even) >> 16) & 0xFFFF).to(tl.uint16)
        quiet = ((bits >> 16) | 0x40).to(tl.uint16)
        rounded = tl.where(x == x, upward, quiet).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(tl.bfloat16)
    return rounded


@triton.jit
def random_bits(t, index):
    """`random_bits` of `storage/quantized.py` for elements of these indices in the local slot, int64."""
    pair = (index >> 8 << 7) | (index & 127)
    x = pair.to(tl.uint32) * 0x9E3779B1 + (t.to(tl.uint32) + 1) * 0x85EBCA77
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 16)) * 0x846CA68B
    x = x ^ (x >> 16)
    return tl.where(index & 128 != 0, x >> 16, x & 0xFFFF).to(tl.int32).to(tl.float32) * (2.0**-16)
