# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Logarithms of second moments: the functions of `__init__.py` for the blocks of a tile.

A tile has the shape (blocks, 256). `index` is the index of an element in the tile, `block` the index of its block, and
`there` whether the slot has that block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_optim.storage import log as constants
from lightning_optim.storage.triton import inverse, positive, store_scale

LEVELS = tl.constexpr(constants.LEVELS)
LOWEST_SPAN = tl.constexpr(constants.LEVELS * constants.FINEST)
HIGHEST_SPAN = tl.constexpr(constants.LEVELS * constants.COARSEST)
WHOLE = tl.constexpr(constants.WHOLE)
WHOLE_BITS = tl.constexpr(0x4B000000)  # of WHOLE, to which integers are added


@triton.jit
def log_dequantize(codes_at, scales_at, index, block, there):
    code = tl.load(codes_at + index, mask=there, other=0).to(tl.int32)
    low = tl.load(scales_at + 2 * block, mask=there, other=0.0).to(tl.int32, bitcast=True)
    step = tl.load(scales_at + 2 * block + 1, mask=there, other=0.0).to(tl.int32)
    return ((code * step + (low - step)) * tl.minimum(code, 1)).to(tl.float32, bitcast=True)


@triton.jit
def log_quantize(codes_at, scales_at, index, block, there, x, dither):
    """Store the codes of x; returns x as it will be dequantized."""
    bits = positive(x).to(tl.int32, bitcast=True)  # 0 where a value is not positive, or NaN
    high = tl.max(bits, axis=1, keep_dims=True)
    least = tl.min((bits - 1).to(tl.uint32, bitcast=True), axis=1, keep_dims=True)  # 0 becomes the largest uint32
    low = tl.maximum(least.to(tl.int32, bitcast=True) + 1, high - HIGHEST_SPAN)
    span = tl.maximum(high - low, LOWEST_SPAN).to(tl.float32)
    whole_step = span * (1.0 / LEVELS) + WHOLE
    step = whole_step.to(tl.int32, bitcast=True) - WHOLE_BITS
    level = tl.maximum(bits - low, 0).to(tl.float32) * (inverse(span) * LEVELS)
    code = (level + dither + (WHOLE + 1.0)).to(tl.int32, bitcast=True)  # above its low byte, WHOLE_BITS
    some = tl.minimum(bits, 1)
    value = (code * step + (low - step - WHOLE_BITS * step)) * some  # wraps around
    tl.store(codes_at + index, (code * some).to(tl.uint8), mask=there)
    store_scale(scales_at + 2 * block, low.to(tl.float32, bitcast=True), there)
    store_scale(scales_at + 2 * block + 1, whole_step - WHOLE, there)
    return value.to(tl.float32, bitcast=True)
