# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""The functions of `__init__.py` for the blocks of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear_dequantize(codes_at, scales_at, index, block, there, STEPS: tl.constexpr):
    codes = tl.load(codes_at + index, mask=there, other=128).to(tl.float32)
    return tl.div_rn(codes - 128.0, STEPS) * tl.load(scales_at + block, mask=there, other=0.0)


@triton.jit
def linear_quantize(codes_at, scales_at, index, block, there, x, STEPS: tl.constexpr):
    """Store the codes of x; returns x as it will be dequantized."""
    scale = tl.max(tl.abs(x), axis=1, keep_dims=True)
    steps = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0)) * STEPS
    code = (steps + 12582912.0) - 12582912.0  # 1.5 * 2**23 leaves no room for a fraction: nearest, ties to even
    tl.store(codes_at + index, (code + 128.0).to(tl.int32).to(tl.uint8), mask=there)
    tl.store(scales_at + block, scale, mask=there)
    return tl.div_rn(code, STEPS) * scale
