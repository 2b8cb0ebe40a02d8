# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""The device functions that printed kernels call: 8-bit codes as in `storage/`, normal numbers as in `philox.py`, and
what Triton's language lacks.

The formats are written twice, here and in torch, because here the bits matter; the tests hold one against the other.
A tile is (lines, 256): a line is the block of elements that shares scales. `index` is the place of an element in the
tile, `line` that of its scales, `there` whether the slot has that line.

Nothing but the Triton engine imports this module, and only when it is used.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LEVELS = tl.constexpr(254.0)
SNAP = tl.constexpr(2.0**-10)
FINEST = tl.constexpr(2048.0)
OCTAVES = tl.constexpr(40)
INVERSE_LEVELS = tl.constexpr(1.0 / 254.0)
CURVE = tl.constexpr(2.0)
WIDEST = tl.constexpr(381.0)
FIRST = tl.constexpr(0xD2511F53)
SECOND = tl.constexpr(0xCD9E8D57)
LAST_PLACE = tl.constexpr(2.0**-53)
TURN = tl.constexpr(2.0 * math.pi)


@triton.jit
def lerp(a, b, weight):
    """As torch computes it: from the nearer end, in one rounding."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), b - a, tl.where(near, a, b))


# Triton before 3.4 does not say otherwise whether it interprets.
INTERPRETED = tl.constexpr(not isinstance(lerp, triton.JITFunction))


@triton.jit
def power(a, b):
    """a ** b for a >= 0."""
    general = tl.where(b == 0.0, 1.0, tl.exp2(b * tl.log2(a)))
    return tl.where(b == 1.0, a, tl.where(b == 0.5, tl.sqrt_rn(a), general))


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def to_bfloat16(x):
    """The nearest bfloat16, ties to even. The interpreter would cut off, so there it is done on the bits."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        nearest = (((bits.to(tl.int64) + 0x7FFF + even) >> 16) & 0xFFFF).to(tl.uint16)
        quiet = ((bits >> 16) | 0x40).to(tl.uint16)
        rounded = tl.where(x == x, nearest, quiet).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(tl.bfloat16)
    return rounded


@triton.jit
def random_bits(t, index):
    """`storage.quantized.random_bits` for elements at these places of the whole slot, int64."""
    pair = (index >> 8 << 7) | (index & 127)
    x = pair.to(tl.uint32) * 0x9E3779B1 + (t.to(tl.uint32) + 1) * 0x85EBCA77
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 16)) * 0x846CA68B
    x = x ^ (x >> 16)
    return tl.where(index & 128 != 0, x >> 16, x & 0xFFFF).to(tl.int32).to(tl.float32) * (2.0**-16)


# ---------------------------------------------------------------------------------------------- log


@triton.jit
def nearest(x):
    """The nearest integer, ties to even, as a float, for 0 <= x < 2**31."""
    small = (x + 8388608.0) - 8388608.0  # 2**23 leaves no room for a fraction; larger values have none
    return tl.where(x < 8388608.0, small, x)


@triton.jit
def log_step(low, high):
    return tl.maximum((high - low).to(tl.float32) * INVERSE_LEVELS, FINEST)


@triton.jit
def log_values(codes, low, high):
    above = nearest(tl.maximum(codes - 1.0, 0.0) * log_step(low, high)).to(tl.int32)
    value = tl.where(codes == 255.0, high, low + above).to(tl.float32, bitcast=True)
    return tl.where(codes == 0.0, 0.0, value)


@triton.jit
def log_dequantize(codes_at, scales_at, index, line, there):
    codes = tl.load(codes_at + index, mask=there, other=0).to(tl.float32)
    low = tl.load(scales_at + 2 * line, mask=there, other=0.0).to(tl.int32, bitcast=True)
    high = tl.load(scales_at + 2 * line + 1, mask=there, other=0.0).to(tl.int32, bitcast=True)
    return log_values(codes, low, high)


@triton.jit
def log_quantize(codes_at, scales_at, index, line, there, x, random):
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
    tl.store(scales_at + 2 * line, low.to(tl.float32, bitcast=True), mask=there)
    tl.store(scales_at + 2 * line + 1, high.to(tl.float32, bitcast=True), mask=there)
    return log_values(codes, low, high)


# ---------------------------------------------------------------------------------------------- ratio


@triton.jit
def per_root(v):
    return (0x5F400000 - (v.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)


@triton.jit
def ratio_values(codes, scale, partner):
    k = codes - 128.0
    return tl.div_rn(k * scale, (WIDEST - CURVE * tl.abs(k)) * per_root(partner))


@triton.jit
def ratio_dequantize(codes_at, scales_at, index, line, there, partner):
    codes = tl.load(codes_at + index, mask=there, other=128).to(tl.float32)
    return ratio_values(codes, tl.load(scales_at + line, mask=there, other=0.0), partner)


@triton.jit
def ratio_quantize(codes_at, scales_at, index, line, there, x, partner):
    """Store the codes of x; returns x as it will be dequantized."""
    ratio = tl.where(partner > 0.0, x * per_root(partner), 0.0)
    scale = to_bfloat16(tl.max(tl.abs(ratio), axis=1, keep_dims=True)).to(tl.float32)
    y = tl.where(scale > 0.0, tl.div_rn(WIDEST * ratio, scale + CURVE * tl.abs(ratio)), 0.0)
    code = (y + 12582912.0) - 12582912.0  # 1.5 * 2**23 leaves no room for a fraction: nearest, ties to even
    codes = tl.minimum(tl.maximum(code, -127.0), 127.0) + 128.0
    tl.store(codes_at + index, codes.to(tl.int32).to(tl.uint8), mask=there)
    tl.store(scales_at + line, scale, mask=there)
    return ratio_values(codes, scale, partner)


# ---------------------------------------------------------------------------------------------- dynamic


@triton.jit
def dynamic_dequantize(codes_at, scales_at, index, line, there, codebook):
    codes = tl.load(codes_at + index, mask=there, other=0).to(tl.int32)
    return tl.load(codebook + codes) * tl.load(scales_at + line, mask=there, other=0.0)


@triton.jit
def dynamic_quantize(codes_at, scales_at, index, line, there, x, codebook, SIGNED: tl.constexpr):
    """Store the codes of x; returns x as it will be dequantized."""
    size = tl.abs(x)
    column = index % 256
    largest = tl.max(size, axis=1, keep_dims=True)
    first = tl.min(tl.where(size == largest, column, 255), axis=1, keep_dims=True)
    scale = tl.sum(tl.where(column == first, x, 0.0), axis=1, keep_dims=True)
    z = tl.where(scale != 0.0, tl.div_rn(x, scale), 0.0)
    above = tl.zeros_like(column)  # how many entries are below z, up to 255
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
    tl.store(scales_at + line, scale, mask=there)
    return tl.load(codebook + codes) * scale


# ---------------------------------------------------------------------------------------------- normal numbers


@triton.jit
def normal(seed_low, seed_high, t, tensor, first, run, stride, local):
    """`philox.normals` for the local elements at these places, int64."""
    if run == stride:  # noqa: SIM108  one branch alone is run, which a choice between values is not
        place = first + local
    else:
        place = first + local // run * stride + local % run
    pair = place >> 1
    c0, c1 = pair.to(tl.uint32), (pair >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + tensor.to(tl.uint32), tl.zeros_like(c0) + t.to(tl.uint32)
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, FIRST), c0 * FIRST
        high1, low1 = tl.umulhi(c2, SECOND), c2 * SECOND
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    radius = tl.sqrt(-2.0 * tl.log(uniform(c0, c1)))
    # An odd place has the sine, which is the cosine a quarter of a turn before.
    turn = uniform(c2, c3) - (place & 1).to(tl.float64) * 0.25
    return (radius * cosine(turn)).to(tl.float32)


@triton.jit
def cosine(turn):
    """The cosine of some turns, float64, of less than a million. CUDA's own serves any angle, which takes a stack."""
    quarter = tl.floor(turn * 4.0 + 0.5)
    x = (turn - quarter * 0.25) * tl.full((), TURN, tl.float64)  # at most an eighth of a turn
    z = x * x
    # Polynomials of Sun's fdlibm, right to the last place of a double there.
    even = tl.full((), -1.13596475577881948265e-11, tl.float64)
    even = tl.full((), 2.08757232129817482790e-09, tl.float64) + z * even
    even = tl.full((), -2.75573143513906633035e-07, tl.float64) + z * even
    even = tl.full((), 2.48015872894767294178e-05, tl.float64) + z * even
    even = tl.full((), -1.38888888888741095749e-03, tl.float64) + z * even
    even = tl.full((), 4.16666666666666019037e-02, tl.float64) + z * even
    odd = tl.full((), 1.58969099521155010221e-10, tl.float64)
    odd = tl.full((), -2.50507602534068634195e-08, tl.float64) + z * odd
    odd = tl.full((), 2.75573137070700676789e-06, tl.float64) + z * odd
    odd = tl.full((), -1.98412698298579493134e-04, tl.float64) + z * odd
    odd = tl.full((), 8.33333333332248946124e-03, tl.float64) + z * odd
    odd = tl.full((), -1.66666666666666324348e-01, tl.float64) + z * odd
    which = quarter.to(tl.int32) & 3
    size = tl.where((which & 1) == 0, 1.0 - (z * 0.5 - z * z * even), x + x * z * odd)
    return tl.where((which == 1) | (which == 2), -size, size)


@triton.jit
def uniform(a, b):
    """53 bits of two words, float64, between 0 and 1."""
    return (((a >> 6).to(tl.int64) * 134217728 + (b >> 5).to(tl.int64)).to(tl.float64) + 0.5) * LAST_PLACE


# ---------------------------------------------------------------------------------------------- sums


@triton.jit
def combine_blocks(partials, table, results, WIDTH: tl.constexpr, COUNT: tl.constexpr, MAXIMUM: tl.constexpr):
    """The results of each tensor from those of its blocks, always in the same order. One program per result."""
    row = tl.program_id(0) // COUNT
    which = tl.program_id(0) % COUNT
    first = tl.load(table + row * WIDTH)
    last = tl.load(table + (row + 1) * WIDTH)
    empty = float("-inf") if MAXIMUM else 0.0
    found = tl.full((1024,), empty, tl.float64)
    for low in range(first, last, 1024):
        block = low + tl.arange(0, 1024)
        part = tl.load(partials + block * COUNT + which, mask=block < last, other=empty)
        found = tl.maximum(found, part) if MAXIMUM else found + part
    result = tl.max(found, axis=0) if MAXIMUM else tl.sum(found, axis=0)
    tl.store(results + tl.program_id(0), result)
