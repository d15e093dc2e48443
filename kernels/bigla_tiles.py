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

import triton
import triton.language as tl

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
def sum_gates(g, C: tl.constexpr, REVERSE: tl.constexpr):
    """Inclusive running sums of (C, BK) gates along the tokens, in bits, float32.

    Half-precision gates are summed by a product with a triangle of ones: it is exact (float32
    accumulation of exact products) and cheaper than a scan across warps.
    """
    if g.dtype == tl.float32:
        x = tl.cumsum(g, 0, reverse=REVERSE)
    else:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        ones = (j >= i) if REVERSE else (j <= i)
        x = tl.dot(ones.to(g.dtype), g)
    return x * LOG2E


@triton.jit
def before(x, g):
    """Exclusive running sums from inclusive ones, x of `sum_gates(g)`."""
    return x - g.to(tl.float32) * LOG2E


@triton.jit
def total_gate(g):
    """Sum of (C, BK) gates over the tokens, in bits."""
    return tl.sum(g.to(tl.float32), 0) * LOG2E


@triton.jit
def reduce_segment(
    p_x, p_y, p_right, p_left, x_stride, y_stride, r_stride, l_stride, n, K, V,
    v0, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MASK_K: tl.constexpr,
    MASK_V: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, INCLUSIVE: tl.constexpr,
):  # fmt: skip
    """What a segment of n tokens adds to the states that flow through it, with its total decays.

    right = sum_t y_t^T x_t exp(r, from t on) and left = sum_t y_t^T x_t exp(l, up to t), where the
    gate of t itself counts if `INCLUSIVE`. Walks the chunks left to right; every exponent is <= 0.
    """
    right = tl.zeros((BV, BK), tl.float32)
    left = tl.zeros((BV, BK), tl.float32)
    right_total = tl.zeros((BK,), tl.float32)
    left_total = tl.zeros((BK,), tl.float32)
    for start in range(0, n, C):
        x = load_tile(p_x, x_stride, n - start, K, C, BK, MASK_K).to(tl.float32)
        y = load_tile(p_y + v0, y_stride, n - start, V - v0, C, BV, MASK_V).to(OP)
        gr = load_tile(p_right, r_stride, n - start, K, C, BK, MASK_K)
        gl = load_tile(p_left, l_stride, n - start, K, C, BK, MASK_K)
        to_right = sum_gates(gr, C, True)
        to_left = sum_gates(gl, C, False)
        if not INCLUSIVE:
            to_right = before(to_right, gr)
            to_left = before(to_left, gl)
        chunk_right = total_gate(gr)
        right *= tl.exp2(chunk_right)[None, :]
        x_right = (x * tl.exp2(to_right)).to(OP)
        right = tl.dot(tl.trans(y), x_right, right, input_precision=PRECISION)
        x_left = (x * tl.exp2(to_left + left_total[None, :])).to(OP)
        left = tl.dot(tl.trans(y), x_left, left, input_precision=PRECISION)
        right_total += chunk_right
        left_total += total_gate(gl)
        p_x += C * x_stride
        p_y += C * y_stride
        p_right += C * r_stride
        p_left += C * l_stride
    return right, left, right_total, left_total


@triton.jit
def store_states(
    p_states, p_decays, right, left, right_total, left_total, flow, slot, first_flow, v0,
    K, V, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Writes what `reduce_segment` returned as flows `first_flow` (right) and the next (left)."""
    p_states += (first_flow * flow + slot) * K * V
    store_state(p_states, right, K, V, v0, BK, BV)
    store_state(p_states + flow * K * V, left, K, V, v0, BK, BV)
    if DECAYS:
        cols = tl.arange(0, BK)
        mask = (cols < K) & (v0 == 0)
        tl.store(p_decays + slot * K + cols, right_total, mask=mask)
        tl.store(p_decays + (flow + slot) * K + cols, left_total, mask=mask)


@triton.jit(do_not_specialize=['n_segments', 'heads'])
def scan_states_kernel(
    p_states, p_decays, n_segments, heads, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """In place: what each segment adds to a state becomes the state that enters the segment.

    states (flow, B*H, segment, V, K) and decays (direction, B*H, segment, K), float32, contiguous;
    flows are S_f, S_b, dS_b, dS_f. One program scans `BLOCK` elements of one flow of one head.
    """
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
    for step in range(n_segments):
        segment = tl.where(leftward == 1, n_segments - 1 - step, step).to(tl.int64)
        p = p_states + segment * K * V + e
        added = tl.load(p, mask=mask, other=0.0)
        decay = tl.load(p_decays + segment * K + e % K, mask=mask, other=0.0)
        tl.store(p, state, mask=mask)
        state = state * tl.exp2(decay) + added
