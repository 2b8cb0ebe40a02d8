# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Dynamic tree quantization: the functions of `__init__.py` for the blocks of a tile.

A tile has the shape (blocks, 256). `index` is the index of an element in the tile, `block` the index of its block, and
`there` whether the slot has that block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dynamic_dequantize(codes_at, scales_at, index, block, there, codebook, SIGNED: tl.constexpr):
    codes = tl.load(codes_at + index, mask=there, other=0).to(tl.int32)
    return tl.load(codebook + codes) * tl.load(scales_at + block, mask=there, other=0.0)


@triton.jit
def dynamic_quantize(codes_at, scales_at, index, block, there, x, codebook, SIGNED: tl.constexpr):
    """Store the codes of x; returns x as it will be dequantized."""
    size = tl.abs(x)
    column = index % 256
    largest = tl.max(size, axis=1, keep_dims=True)
    first = tl.min(tl.where(size == largest, column, 255), axis=1, keep_dims=True)
    scale = tl.sum(tl.where(column == first, x, 0.0), axis=1, keep_dims=True)
    z = tl.where(scale != 0.0, tl.div_rn(x, scale), 0.0)
    above = tl.zeros_like(column)  # the number of entries below z, at most 255
    for bit in tl.static_range(8):
        further = above + (128 >> bit)
        above = tl.where(tl.load(codebook + further - 1) < z, further, above)
    above = tl.maximum(above, 1)
    upper, lower = tl.load(codebook + above), tl.load(codebook + above - 1)
    down = (z - lower) < (upper - z)
    codes = above - down.to(tl.int32)
    if not SIGNED:
        codes = tl.where((x > 0.0) & (codes == 0), 1, codes)
    tl.store(codes_at + index, codes.to(tl.uint8), mask=there)
    tl.store(scales_at + block, scale, mask=there)
    return tl.load(codebook + codes) * scale
