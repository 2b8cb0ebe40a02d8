# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Triton functions that several formats call.

Only the Triton engine imports this module and those of the formats, when it runs for the first time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dither(t, start, index):
    """`dither` of `storage/quantized.py` for the elements `index`, int32, of the tile that begins at `start`, int64."""
    first = start.to(tl.uint32) * 0xC13FA9A9 + t.to(tl.uint32) * 0x91E10DA5
    x = first + index.to(tl.uint32) * 0xC13FA9A9
    # From 2047 to 2048 the fraction is the last 13 bits of a float32.
    return ((x >> 19) | 0x44FFE001).to(tl.float32, bitcast=True) - 2047.5


# Triton before 3.4 has no other way to tell whether the interpreter runs.
INTERPRETED = tl.constexpr(not isinstance(dither, triton.JITFunction))


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
def storable(x, nan_outside):
    """NaN where `nan_outside` is, and where x is not below 2^127 in size, which 8-bit formats store as zero; else x."""
    if INTERPRETED:  # without its warnings
        found = tl.where((tl.abs(x) < 2.0**127) & (nan_outside == 0.0), x, float("nan"))
    else:
        found = tl.fma(x * 2.0, nan_outside, x)  # nan_outside is zero elsewhere, and infinity times zero is NaN
    return found


@triton.jit
def positive(x):
    """0 where x is negative, and where it is NaN; else x."""
    # The maximum with NaN is NaN in the interpreter of Triton 3.6.
    return tl.where(x > 0.0, x, 0.0) if INTERPRETED else tl.maximum(x, 0.0)


@triton.jit
def inverse(x):
    """1 / x, rounded to the nearest and without a branch, for 2^-126 <= x <= 2^126."""
    if INTERPRETED:
        near = tl.div_rn(1.0, x)
    else:
        rough = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        near = tl.fma(tl.fma(x * -1.0, rough, 1.0), rough, rough)
    return near


@triton.jit
def highest_byte(x):
    """Bits 24 to 31 of an int32, as uint8."""
    if INTERPRETED:
        found = (x.to(tl.uint32, bitcast=True) >> 24).to(tl.uint8)
    else:  # of four elements at once
        found = tl.inline_asm_elementwise(
            "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x73; prmt.b32 b, $3, $4, 0x73; prmt.b32 $0, a, b, 0x5410;}",
            "=r,r,r,r,r",
            [x],
            tl.uint8,
            is_pure=True,
            pack=4,
        )
    return found


@triton.jit
def store_scale(at, scale, there):
    """Store a number of each block, (blocks, 1), at addresses of that shape.

    All threads of a warp have the number of its block, and all of them store it. `tl.store` would bring the numbers of
    all blocks into one warp first, through shared memory and two barriers.
    """
    if INTERPRETED:
        tl.store(at, scale, mask=there)
    else:
        # Of one axis, a thread has each number once.
        at, scale = tl.max(at.to(tl.int64), axis=1), tl.max(scale, axis=1)
        there = tl.max(there.to(tl.int32), axis=1)
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.f32 [$1], $2; mov.b32 $0, 0;}",
            "=r,l,f,r",
            [at, scale, there],
            tl.int32,
            is_pure=False,
            pack=1,
        )
