# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""First moments relative to the root of the second: the functions of `__init__.py` for the blocks of a tile.

A tile has the shape (blocks, 256). `index` is the index of an element in the tile, `block` the index of its block, and
`there` whether the slot has that block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_optim.storage import ratio as constants
from lightning_optim.storage.triton import to_bfloat16

CURVE = tl.constexpr(constants.CURVE)
WIDEST = tl.constexpr(constants.WIDEST)


@triton.jit
def per_root(v):
    return (0x5F400000 - (v.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)


@triton.jit
def ratio_values(codes, scale, partner):
    k = codes - 128.0
    return tl.div_rn(k * scale, (WIDEST - CURVE * tl.abs(k)) * per_root(partner))


@triton.jit
def ratio_dequantize(codes_at, scales_at, index, block, there, partner):
    codes = tl.load(codes_at + index, mask=there, other=128).to(tl.float32)
    return ratio_values(codes, tl.load(scales_at + block, mask=there, other=0.0), partner)


@triton.jit
def ratio_quantize(codes_at, scales_at, index, block, there, x, partner):
    """Store the codes of x; returns x as it will be dequantized."""
    ratio = tl.where(partner > 0.0, x * per_root(partner), 0.0)
    scale = to_bfloat16(tl.max(tl.abs(ratio), axis=1, keep_dims=True)).to(tl.float32)
    y = tl.where(scale > 0.0, tl.div_rn(WIDEST * ratio, scale + CURVE * tl.abs(ratio)), 0.0)
    code = (y + 12582912.0) - 12582912.0  # at 1.5 * 2**23 float32 holds only integers: nearest, ties to even
    codes = tl.minimum(tl.maximum(code, -127.0), 127.0) + 128.0
    tl.store(codes_at + index, codes.to(tl.int32).to(tl.uint8), mask=there)
    tl.store(scales_at + block, scale, mask=there)
    return ratio_values(codes, scale, partner)
