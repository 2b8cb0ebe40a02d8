# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""First moments relative to the root of the second: the functions of `__init__.py` for the blocks of a tile.

A tile has the shape (blocks, 256). `index` is the index of an element in the tile, `block` the index of its block, and
`there` whether the slot has that block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_optim.storage import curve
from lightning_optim.storage import ratio as constants
from lightning_optim.storage.curve.triton import load_curve, store_curve

EXPONENT = tl.constexpr(constants.EXPONENT)
ROOT = tl.constexpr(constants.ROOT)
PER_ROOT = tl.constexpr(constants.PER_ROOT)
RATIO_SHIFT = tl.constexpr(constants.SHIFT)
RATIO_WIDTH = tl.constexpr(curve.WIDTH[constants.SHIFT])


@triton.jit
def ratio_dequantize(codes_at, scales_at, index, block, there, partner):
    root = ROOT + ((partner.to(tl.int32, bitcast=True) & EXPONENT) >> 1)
    values = load_curve(codes_at, scales_at, index, block, there, RATIO_SHIFT, RATIO_WIDTH)
    return values * root.to(tl.float32, bitcast=True)


@triton.jit
def ratio_quantize(codes_at, scales_at, index, block, there, x, partner):
    """Store the codes of x."""
    bits = partner.to(tl.int32, bitcast=True)
    per_root = PER_ROOT * tl.minimum(bits, 1) - ((bits & EXPONENT) >> 1)  # 0 where the root is zero
    ratio = x * per_root.to(tl.float32, bitcast=True)
    store_curve(codes_at, scales_at, index, block, there, ratio, RATIO_SHIFT, RATIO_WIDTH)
