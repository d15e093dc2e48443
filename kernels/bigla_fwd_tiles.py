"""Tiles of the forward of `bidirectional_gla` from the chunk's edges, made to need few registers.

Notation: `bigla_tiles.py`. `z` is a zero that the compiler does not know: without it the addresses
of all tiles stay in registers over a loop.
"""

import triton
import triton.language as tl

from mmvig.kernels.bigla_tiles import INTERPRETED, LOG2E


@triton.jit
def offset(i, stride):
    """i times stride in 64 bits; with 32-bit factors it is one instruction."""
    return i.to(tl.int64) * stride


@triton.jit
def get(p, stride, n, width, z, R: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr):
    """Rows 0..R of (n, width) at `p`, with zeros beyond n rows and `width` columns."""
    rows = tl.arange(0, R) + z
    cols = tl.arange(0, B)
    mask = rows[:, None] < n
    if MASK:
        mask = mask & (cols[None, :] < width)
    return tl.load(p + (rows[:, None] * stride + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def put(p, x, stride, n, width, z, R: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr):
    """The converse of `get`."""
    rows = tl.arange(0, R) + z
    cols = tl.arange(0, B)
    mask = rows[:, None] < n
    if MASK:
        mask = mask & (cols[None, :] < width)
    tl.store(p + (rows[:, None] * stride + cols[None, :]), x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def get_state(p, K, V, v0, z, BV: tl.constexpr, BK: tl.constexpr):
    """Rows v0.. of a contiguous (V, K) state."""
    rows = v0 + z + tl.arange(0, BV)
    cols = tl.arange(0, BK)
    at = p + (rows[:, None] * K + cols[None, :])
    if V % BV == 0 and BK == K:
        return tl.load(at)
    else:
        return tl.load(at, mask=(rows[:, None] < V) & (cols[None, :] < K), other=0.0)


@triton.jit
def put_state(p, x, K, V, v0, z, BV: tl.constexpr, BK: tl.constexpr):
    """The converse of `get_state`."""
    rows = v0 + z + tl.arange(0, BV)
    cols = tl.arange(0, BK)
    at = p + (rows[:, None] * K + cols[None, :])
    x = x.to(p.dtype.element_ty)
    if V % BV == 0 and BK == K:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=(rows[:, None] < V) & (cols[None, :] < K))


@triton.jit
def decayed(x, bits, OP: tl.constexpr):
    """x times 2 to the `bits`, as an operand of products."""
    if x.dtype == tl.bfloat16:
        return x.to(OP) * tl.exp2(bits).to(OP)
    else:
        return (x.to(tl.float32) * tl.exp2(bits)).to(OP)


@triton.jit
def late(x, zero):
    """x, in a way that keeps the compiler from converting its layout before later loads."""
    if x.dtype == tl.float32:
        return (x.to(tl.int32, bitcast=True) | zero).to(tl.float32, bitcast=True)
    else:
        return (x.to(tl.int16, bitcast=True) | zero.to(tl.int16)).to(x.dtype, bitcast=True)


@triton.jit
def table(p, C: tl.constexpr, WHICH: tl.constexpr):
    """Weights (C, C) from memory: computed they take 250 instructions."""
    i = tl.arange(0, C)
    return tl.load(p + (WHICH * C * C + i[:, None] * C + i[None, :]))


@triton.jit
def sum_own(weights, g, own):
    """As `sum_gates`, plus `own` (BK,) in all rows, for gates of half precision."""
    x = own[None, :] + tl.zeros((weights.shape[0], own.shape[0]), tl.float32)
    if INTERPRETED:
        return tl.dot(weights.to(tl.float32), g.to(tl.float32), x) * LOG2E
    else:
        return tl.dot(weights.to(g.dtype), g, x) * LOG2E


@triton.jit
def merge(a_f, a_b, z, OP: tl.constexpr):
    """Scores of both directions: one on each side of the diagonal, their sum (twice one) on it."""
    rows = tl.arange(0, a_f.shape[0])
    cols = rows + z
    a = tl.where(rows[:, None] >= cols[None, :], a_f, a_b)
    return tl.where(rows[:, None] == cols[None, :], a + a, a).to(OP)
