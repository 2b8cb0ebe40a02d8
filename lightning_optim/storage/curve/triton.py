# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Signed values relative to the largest of their block: the functions of `__init__.py` for the blocks of a tile.

A tile has the shape (blocks, 256). `index` is the index of an element in the tile, `block` the index of its block, and
`there` whether the slot has that block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_optim.storage import curve as constants
from lightning_optim.storage.triton import highest_byte, inverse, positive, store_scale

SHIFT = tl.constexpr(constants.SHIFT)
WIDTH = tl.constexpr(constants.WIDTH[constants.SHIFT])
SMALLEST = tl.constexpr(constants.SMALLEST)
ORIGIN = tl.constexpr(constants.ORIGIN)


@triton.jit
def load_curve(codes_at, scales_at, index, block, there, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    code = tl.load(codes_at + index, mask=there, other=0).to(tl.int32)
    scale = tl.load(scales_at + block, mask=there, other=0.0)
    w = (((code & 127) << SHIFT) + ORIGIN).to(tl.float32, bitcast=True)
    size = (w - 2.0) * (1.0 / WIDTH) * scale
    return (size.to(tl.int32, bitcast=True) | ((code & 128) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def store_curve(codes_at, scales_at, index, block, there, x, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    size = positive(tl.abs(x))  # 0 where a value is NaN
    # Positive numbers have the order of their bits, and integers have an instruction for the maximum of a warp.
    largest = tl.max(size.to(tl.int32, bitcast=True), axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    some = (largest > SMALLEST) & (largest < float("inf"))
    per_scale = tl.where(some, inverse(largest * 0.25) * (WIDTH * 0.25), 0.0)
    w = (size * per_scale + 2.0).to(tl.int32, bitcast=True)
    code = (w << (24 - SHIFT)) + 8388608  # plus a half of a code, which is bits 24 to 30
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    tl.store(codes_at + index, highest_byte(code | sign), mask=there)
    store_scale(scales_at + block, tl.where(some, largest, 0.0), there)


@triton.jit
def curve_dequantize(codes_at, scales_at, index, block, there):
    return load_curve(codes_at, scales_at, index, block, there, SHIFT, WIDTH)


@triton.jit
def curve_quantize(codes_at, scales_at, index, block, there, x):
    """Store the codes of x."""
    store_curve(codes_at, scales_at, index, block, there, x, SHIFT, WIDTH)
