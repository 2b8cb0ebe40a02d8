# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Normal numbers, as in `distributed/philox.py`."""

from __future__ import annotations

import math

import triton
import triton.language as tl

FIRST = tl.constexpr(0xD2511F53)
SECOND = tl.constexpr(0xCD9E8D57)
LAST_BIT = tl.constexpr(2.0**-53)
TURN = tl.constexpr(2.0 * math.pi)


@triton.jit
def normal(seed_low, seed_high, t, tensor, first, run, stride, rows, columns, unit, local):
    """The normal numbers of some elements of one tensor, as `normals` of `distributed/philox.py` computes them.

    Args:
        seed_low: The lower 32 bits of the seed, a scalar, int64.
        seed_high: The upper 32 bits, a scalar, int64.
        t: The step, a scalar, int64.
        tensor: The identifier of the tensor, a scalar, int64.
        first: The global index of the first local element, a scalar, int64.
        run: How many local elements are consecutive in the whole tensor, a scalar, int64.
        stride: The distance between the starts of two runs in the whole tensor, a scalar, int64.
        rows: The rows of a table of the order in memory, as of `exchange_of`, a scalar, int64.
        columns: The columns of such a table, a scalar, int64.
        unit: The elements of an entry of such a table, a scalar, int64.
        local: The indices of the elements in memory, (blocks, 256), int64.

    Returns:
        One number per element, (blocks, 256), float32.
    """
    if rows * columns > 1:
        group = local // unit
        at = group % (rows * columns)
        local = (group - at + at % columns * rows + at // columns) * unit + local % unit
    if run == stride:  # noqa: SIM108  only one branch runs, while a conditional expression would compute both
        index = first + local
    else:
        index = first + local // run * stride + local % run
    pair = index >> 1
    c0, c1 = pair.to(tl.uint32), (pair >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + tensor.to(tl.uint32), tl.zeros_like(c0) + t.to(tl.uint32)
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, FIRST), c0 * FIRST
        high1, low1 = tl.umulhi(c2, SECOND), c2 * SECOND
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    radius = tl.sqrt(-2.0 * tl.log(uniform(c0, c1)))
    # An odd index gets the sine, which is the cosine a quarter of a turn earlier.
    turn = uniform(c2, c3) - (index & 1).to(tl.float64) * 0.25
    return (radius * cosine(turn)).to(tl.float32)


@triton.jit
def cosine(turn):
    """The cosine of angles in turns below a million, (blocks, 256), float64.

    CUDA's own function takes any angle, and needs a stack for it.
    """
    quarter = tl.floor(turn * 4.0 + 0.5)
    x = (turn - quarter * 0.25) * tl.full((), TURN, tl.float64)  # at most an eighth of a turn
    z = x * x
    # The polynomials of Sun's fdlibm, accurate to the last bit of a float64 in this range.
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
    """Uniform numbers in (0, 1) with 53 bits, (blocks, 256), float64, from two words each, uint32."""
    return (((a >> 6).to(tl.int64) * 134217728 + (b >> 5).to(tl.int64)).to(tl.float64) + 0.5) * LAST_BIT
