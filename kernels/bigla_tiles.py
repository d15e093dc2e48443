"""Pieces that the forward and the backward of `bidirectional_gla` share: tiles, states, the scan.

Notation, for one head and one chunk of C tokens (i receives, j gives):

    c_i = sum of g_fwd over the chunk's tokens up to and including i       (decays to the right)
    d_i = sum of g_bwd over the chunk's tokens from i on                   (decays to the left)

Token j reaches i >= j with weight exp(c_i - c_j), and i <= j with weight exp(d_i - d_j); a state
that enters the chunk reaches i with exp(c_i) (from the left) or exp(d_i) (from the right). Gates
become base-2 logarithms when they are summed, since the GPU's exponential is one of base 2.

Four states flow over the sequence, all (V, K) and float32: S_f and S_b, sums of v^T k, to the right
and to the left; in the backward pass dS_b and dS_f, sums of do^T q, to the right and to the left.
Value channels lead, so that decays scale columns, as they do in every other tile.
"""

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div
from mmvig.kernels.launch import await_previous, kernel

# The interpreter has no products of bfloat16.
INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')
LOG2E = tl.constexpr(1.4426950408889634)
# Up to this total decay of a chunk, in bits, both factors of exp2(c_i - c_j) =
# exp2(c_i - m) exp2(m - c_j), with m in the middle, and their product stay finite in float32 (and
# bfloat16) wherever they are formed; beyond it the exact path is taken.
MAX_CHUNK_BITS = tl.constexpr(96.0)


@triton.jit
def load_tile(p, stride, n, width, C: tl.constexpr, B: tl.constexpr, MASK_COLS: tl.constexpr):
    """Rows 0..C of (n, width) at `p`, with zeros beyond n rows and `width` columns."""
    rows = tl.arange(0, C)
    cols = tl.arange(0, B)
    mask = rows[:, None] < n
    if MASK_COLS:
        mask = mask & (cols[None, :] < width)
    return tl.load(p + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(p, x, stride, n, width, C: tl.constexpr, B: tl.constexpr, MASK_COLS: tl.constexpr):
    """The converse of `load_tile`; casts to the dtype of `p`."""
    rows = tl.arange(0, C)
    cols = tl.arange(0, B)
    mask = rows[:, None] < n
    if MASK_COLS:
        mask = mask & (cols[None, :] < width)
    tl.store(p + rows[:, None] * stride + cols[None, :], x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_state(p, K, V, v0, BK: tl.constexpr, BV: tl.constexpr, KEEP=True):
    """Rows v0.. of a contiguous (V, K) state as a (BV, BK) tile; zeros if not KEEP."""
    v = v0 + tl.arange(0, BV)
    k = tl.arange(0, BK)
    mask = (v[:, None] < V) & (k[None, :] < K) & KEEP
    return tl.load(p + v[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(p, x, K, V, v0, BK: tl.constexpr, BV: tl.constexpr):
    """The converse of `load_state`; casts to the dtype of `p`."""
    v = v0 + tl.arange(0, BV)
    k = tl.arange(0, BK)
    mask = (v[:, None] < V) & (k[None, :] < K)
    tl.store(p + v[:, None] * K + k[None, :], x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def before(C: tl.constexpr, STRICT: tl.constexpr, LESS: tl.constexpr = 0.0):
    """Weights (C, C): 1 where token j (column) comes before i (row) or is i, unless `STRICT`.

    `LESS` is subtracted everywhere.
    """
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (((j < i) if STRICT else (j <= i)).to(tl.float32) - LESS).to(tl.bfloat16)


@triton.jit
def after(C: tl.constexpr, STRICT: tl.constexpr, LESS: tl.constexpr = 0.0):
    """As `before`, for tokens j that come after i."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (((j > i) if STRICT else (j >= i)).to(tl.float32) - LESS).to(tl.bfloat16)


@triton.jit
def segment_chunks(i_s, n_segments, n_chunks):
    """First chunk of segment i_s and how many it has: segments differ by one chunk at most."""
    each = n_chunks // n_segments
    longer = n_chunks % n_segments
    return i_s * each + tl.minimum(i_s, longer), each + tl.where(i_s < longer, 1, 0)


@triton.jit
def leading_bits(x):
    """float32 x cut to the precision of bfloat16, by masking: cheaper than rounding to and fro."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def sum_tokens(weights, x, PARTS: tl.constexpr):
    """weights (R, C), bfloat16 of magnitude 0, 0.5 or 1, times x (C, BK), accumulated in float32.

    Sums over tokens as matrix products, which are cheaper than scans and reductions across warps.
    Exact to float32 for x of half precision; float32 x is cut into PARTS (2 or 3) of 8 bits.
    """
    if INTERPRETED:
        return tl.dot(weights.to(tl.float32), x.to(tl.float32))
    elif x.dtype == tl.float32:
        high = leading_bits(x)
        x -= high
        y = tl.dot(weights, high.to(tl.bfloat16))
        if PARTS > 2:
            high = leading_bits(x)
            x -= high
            y = tl.dot(weights, high.to(tl.bfloat16), y)
        return tl.dot(weights, x.to(tl.bfloat16), y)
    else:
        return tl.dot(weights.to(x.dtype), x)


@triton.jit
def sum_gates(weights, g):
    """Weighted sums of (C, BK) gates over tokens, in bits."""
    return sum_tokens(weights, g, 3) * LOG2E


@triton.jit
def half_gates(g, C: tl.constexpr, ROWS: tl.constexpr):
    """Half the sum of (C, BK) gates over the chunk, in bits, the same in each of `ROWS` rows."""
    return sum_gates(tl.full((ROWS, C), 0.5, tl.float32).to(tl.bfloat16), g)


@triton.jit
def scan_gates(g, REVERSE: tl.constexpr, STRICT: tl.constexpr):
    """Sums of (C, BK) gates up to each token (from it on if `REVERSE`; itself out if `STRICT`).

    For the exact path: slower than `sum_gates`, but needs no shared memory for weights.
    """
    g = g.to(tl.float32)
    x = tl.cumsum(g, 0, reverse=REVERSE)
    return (x - g if STRICT else x) * LOG2E


@triton.jit
def reduce_segment(
    p_x, p_y, p_right, p_left, x_stride, y_stride, r_stride, l_stride, n, K, V,
    v0, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MASK_K: tl.constexpr,
    MASK_V: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, INCLUSIVE: tl.constexpr,
):  # fmt: skip
    """What a segment of n tokens adds to the states that flow through it, with its total decays.

    right = sum_t y_t^T x_t exp(r, from t on) and left = sum_t y_t^T x_t exp(l, up to t), where the
    gate of t itself counts if `INCLUSIVE`. Walks the chunks left to right; every exponent is <= 0.
    The decays are (BV, BK) and (C, BK), all rows the same; `weakest` is half the smallest total
    gate of a chunk, in bits.
    """
    right = tl.zeros((BV, BK), tl.float32)
    left = tl.zeros((BV, BK), tl.float32)
    right_total = tl.zeros((BV, BK), tl.float32)
    left_total = tl.zeros((C, BK), tl.float32)
    weakest_right = tl.zeros((BV, BK), tl.float32)
    weakest_left = tl.zeros((C, BK), tl.float32)
    right_weights = after(C, not INCLUSIVE)
    left_weights = before(C, not INCLUSIVE)
    for start in range(0, n, C):
        x = load_tile(p_x, x_stride, n - start, K, C, BK, MASK_K).to(tl.float32)
        y = load_tile(p_y + v0, y_stride, n - start, V - v0, C, BV, MASK_V).to(OP)
        gr = load_tile(p_right, r_stride, n - start, K, C, BK, MASK_K)
        gl = load_tile(p_left, l_stride, n - start, K, C, BK, MASK_K)
        half_right = half_gates(gr, C, BV)
        right *= tl.exp2(2.0 * half_right)
        x_right = (x * tl.exp2(sum_gates(right_weights, gr))).to(OP)
        right = tl.dot(tl.trans(y), x_right, right, input_precision=PRECISION)
        to_left = sum_gates(left_weights, gl) + left_total
        x_left = (x * tl.exp2(to_left)).to(OP)
        left = tl.dot(tl.trans(y), x_left, left, input_precision=PRECISION)
        right_total += 2.0 * half_right
        weakest_right = tl.minimum(weakest_right, half_right)
        half_left = half_gates(gl, C, C)
        left_total += 2.0 * half_left
        weakest_left = tl.minimum(weakest_left, half_left)
        p_x += C * x_stride
        p_y += C * y_stride
        p_right += C * r_stride
        p_left += C * l_stride
    weakest = tl.minimum(tl.min(weakest_right), tl.min(weakest_left))
    return right, left, right_total, left_total, weakest


@triton.jit
def store_states(
    p_states, p_decays, p_weakest, right, left, right_total, left_total, weakest, flow, slot,
    first_flow, v0,
    K, V, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Writes what `reduce_segment` returned as flows `first_flow` (right) and the next (left)."""
    p_states += (first_flow * flow + slot) * K * V
    store_state(p_states, right, K, V, v0, BK, BV)
    store_state(p_states + flow * K * V, left, K, V, v0, BK, BV)
    if DECAYS:
        cols = tl.arange(0, BK)[None, :]
        rows = tl.arange(0, right_total.shape[0])[:, None]
        mask = (rows == 0) & (cols < K) & (v0 == 0)
        tl.store(p_decays + slot * K + cols + 0 * rows, right_total, mask=mask)
        rows = tl.arange(0, left_total.shape[0])[:, None]
        mask = (rows == 0) & (cols < K) & (v0 == 0)
        tl.store(p_decays + (flow + slot) * K + cols + 0 * rows, left_total, mask=mask)
        tl.store(p_weakest + slot, weakest, mask=v0 == 0)


@kernel(sizes=['n_segments', 'heads'])
def scan_states_kernel(
    p_states, p_decays, n_segments, heads, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """In place: what each segment adds to a state becomes the state that enters the segment.

    states (flow, B*H, segment, V, K) and decays (direction, B*H, segment, K), float32, contiguous;
    flows are S_f, S_b, dS_b, dS_f. One program scans `BLOCK` elements of one flow of one head.
    """
    await_previous()
    flow = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < K * V
    leftward = flow % 2
    by_fwd = (flow == 0) | (flow == 3)
    direction = tl.where(by_fwd, 0, 1).to(tl.int64)
    p_states += (flow * heads + head) * n_segments * K * V
    p_decays += (direction * heads + head) * n_segments * K
    state = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(n_segments, num_stages=8):
        segment = tl.where(leftward == 1, n_segments - 1 - step, step).to(tl.int64)
        p = p_states + segment * K * V + e
        added = tl.load(p, mask=mask, other=0.0)
        decay = tl.load(p_decays + segment * K + e % K, mask=mask, other=0.0)
        tl.store(p, state, mask=mask)
        state = state * tl.exp2(decay) + added


def scan_states(states: Tensor, decays: Tensor) -> None:
    """Launches `scan_states_kernel` over (flow, B*H, segment, V, K) states, in place."""
    flows, heads, n_segments, dv, dk = states.shape
    block = 128
    scan_states_kernel[ceil_div(dk * dv, block), flows, heads](
        states, decays, n_segments, heads, dk, dv, BLOCK=block, num_warps=1
    )


def strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head strides of (B, N, H, D) tensors, in the order of the kernels."""
    return [s for x in tensors for s in x.stride()[:3]]


@lru_cache
def triangles(chunk: int, device: torch.device) -> Tensor:
    """Ones up to, from, after and before each token: (4, C, C) bfloat16, weights of sums.

    Copied from the host, which waits for it, so that any stream may read it; not while a CUDA graph
    is captured, to whose memory it would belong: a self-check calls this first.
    """
    x = torch.ones(chunk, chunk, dtype=torch.bfloat16)
    return torch.stack([x.tril(), x.triu(), x.triu(1), x.tril(-1)]).to(device)
