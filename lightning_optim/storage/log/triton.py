# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Logarithms of second moments: the functions of `__init__.py` for the blocks of a tile.

A tile has the shape (blocks, 256). `index` is the index of an element in the tile, `block` the index of its block, and
`there` whether the slot has that block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_optim.storage import log as constants
from lightning_optim.storage.triton import nearest

LEVELS = tl.constexpr(constants.LEVELS)
SNAP = tl.constexpr(constants.SNAP)
FINEST = tl.constexpr(constants.FINEST)
OCTAVES = tl.constexpr(constants.OCTAVES)
INVERSE_LEVELS = tl.constexpr(1.0 / constants.LEVELS)


@triton.jit
def log_step(low, high):
    return tl.maximum((high - low).to(tl.float32) * INVERSE_LEVELS, FINEST)


@triton.jit
def log_values(codes, low, high):
    above = nearest(tl.maximum(codes - 1.0, 0.0) * log_step(low, high)).to(tl.int32)
    value = tl.where(codes == 255.0, high, low + above).to(tl.float32, bitcast=True)
    return tl.where(codes == 0.0, 0.0, value)


@triton.jit
def log_dequantize(codes_at, scales_at, index, block, there):
    codes = tl.load(codes_at + index, mask=there, other=0).to(tl.float32)
    low = tl.load(scales_at + 2 * block, mask=there, other=0.0).to(tl.int32, bitcast=True)
    high = tl.load(scales_at + 2 * block + 1, mask=there, other=0.0).to(tl.int32, bitcast=True)
    return log_values(codes, low, high)


@triton.jit
def log_quantize(codes_at, scales_at, index, block, there, x, random):
    """Store the codes of x; returns x as it will be dequantized."""
    positive = x > 0.0
    bits = tl.where(positive, x, 0.0).to(tl.int32, bitcast=True)
    high = tl.max(bits, axis=1, keep_dims=True)
    low = tl.min(tl.where(positive, bits, high), axis=1, keep_dims=True)
    low = tl.maximum(low, tl.where(high > 0, tl.maximum(high - OCTAVES * 8388608, 1), 0))
    step = log_step(low, high)
    level = (bits - low).to(tl.float32) * tl.div_rn(1.0, step)
    level = tl.maximum(level, 0.0)
    near = nearest(level)
    rounded = tl.where(tl.abs(level - near) < SNAP, near, tl.floor(level + random))
    rounded = tl.minimum(rounded, LEVELS)
    last = nearest(rounded * step) >= (high - low).to(tl.float32)
    codes = tl.where(last | (bits >= high), LEVELS, rounded) + 1.0
    codes = tl.where(positive, codes, 0.0)
    tl.store(codes_at + index, codes.to(tl.int32).to(tl.uint8), mask=there)
    tl.store(scales_at + 2 * block, low.to(tl.float32, bitcast=True), mask=there)
    tl.store(scales_at + 2 * block + 1, high.to(tl.float32, bitcast=True), mask=there)
    return log_values(codes, low, high)
