"""Forward of `bidirectional_gla` with decays measured from the chunk's edges: kernels, launcher.

Notation: `bigla_tiles.py`. With the reference point at the chunk's edge, `q_i e^{c_i}` serves both
the scores and the state that enters, which needs no decay of its own; the factors `k_j e^{-c_j}`
then reach twice as many bits as from the middle. States of segments are kept in the dtype of
products. A segment of one chunk has no loop, and other choices in its kernels, named FLAT. The
weights of sums over tokens come from memory, where computing them takes 250 instructions.
"""

import math
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from mmvig.kernels.bigla_fwd_exact import launch_exact
from mmvig.kernels.bigla_fwd_tiles import (
    decayed,
    get,
    get_state,
    late,
    merge,
    offset,
    put,
    put_state,
    sum_own,
    table,
)
from mmvig.kernels.bigla_plan import make_plan
from mmvig.kernels.bigla_tiles import half_gates, segment_chunks, strides, sum_gates, triangles
from mmvig.kernels.grid import ceil_div, multiprocessors
from mmvig.kernels.launch import await_previous, kernel

# Launch options as measured on an H200: of segments of one chunk, of two, of more. Three stages of
# loads pay in a loop, three programs a multiprocessor where it is short.
FLAT = dict(num_warps=4, num_stages=1)
SHORT = dict(num_warps=4, num_stages=2, maxnreg=168)
LONG = dict(num_warps=4, num_stages=3)
# Chunks of a segment, by the chunks of all heads that a multiprocessor has to do at most; measured.
LENGTHS = ((4, 1), (8, 2), (24, 6), (64, 8), (math.inf, 16))
# Up to so many chunks a sequence stays in one piece where the heads fill the device.
ONE_SEGMENT = 8


@kernel(sizes=['N', 'H', 'n_segments', 'n_chunks'])
def adds_kernel(
    p_k, p_v, p_gf, p_gb, p_adds, p_decays, p_weakest, p_table,
    k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, n_segments, n_chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """What each segment adds to S_f and S_b, and its decays. Program: (head, segment, V block).

    k, gates (B, N, H, K), v (B, N, H, V); adds (flow, B*H, segment, V, K) of dtype OP, decays
    (flow, B*H, segment, K) in bits, weakest (B*H, segment) the strongest decay of a chunk, float32;
    table as `triangles` makes it. Products accumulate in float32.
    """
    await_previous()
    head = tl.program_id(0)
    b = head // H
    h = head % H
    i_s = tl.program_id(1)
    v0 = tl.program_id(2) * BV
    first, size = segment_chunks(i_s, n_segments, n_chunks)
    if FLAT:
        first = i_s
    t = first * C
    n = N - t
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    p_k += offset(b, k_b) + offset(t, k_n) + offset(h, k_h)
    p_v += offset(b, v_b) + offset(t, v_n) + offset(h, v_h) + v0
    p_gf += offset(b, gf_b) + offset(t, gf_n) + offset(h, gf_h)
    p_gb += offset(b, gb_b) + offset(t, gb_n) + offset(h, gb_h)
    zero = tl.minimum(N, 0)
    z = 0
    behind = table(p_table, C, 2)
    ahead = table(p_table, C, 3)
    right = tl.zeros((BV, BK), tl.float32)
    left = tl.zeros((BV, BK), tl.float32)
    total_f = tl.zeros((C if FLAT else BV, BK), tl.float32)
    total_b = tl.zeros((C if FLAT else BV, BK), tl.float32)
    weakest = tl.zeros((C if FLAT else BV,), tl.float32)
    for i_c in range(1 if FLAT else size):
        if not FLAT:
            z = (i_c & zero) * 64
        t = i_c * C
        gf = get(p_gf + offset(t, gf_n), gf_n, n - t, K, z, C, BK, mask_k)
        gb = get(p_gb + offset(t, gb_n), gb_n, n - t, K, z, C, BK, mask_k)
        v = get(p_v + offset(t, v_n), v_n, n - t, V - v0, z, C, BV, mask_v)
        k = get(p_k + offset(t, k_n), k_n, n - t, K, z, C, BK, mask_k)
        if SETTLE:
            k = late(k, zero)
        v = v.to(OP)
        c = sum_gates(behind, gf)
        d = sum_gates(ahead, gb)
        k_f = decayed(k, c, OP)
        k_b_ = decayed(k, d, OP)
        if FLAT:
            right = tl.dot(tl.trans(v), k_f, input_precision=PRECISION)
            left = tl.dot(tl.trans(v), k_b_, input_precision=PRECISION)
            # Row 0 of c and the last row of d lack their own gate to be the totals. Products form
            # them once more, which keeps the tables' memory from being used again for smaller
            # tiles: ptxas 12.8 then builds a wgmma descriptor from a register nothing wrote.
            cols = tl.arange(0, BK)
            own = tl.load(p_gf + cols, mask=cols < K, other=0.0).to(tl.float32)
            total_f = sum_own(behind, gf, own)
            end = tl.minimum(n, C) - 1
            own = tl.load(p_gb + offset(end, gb_n) + cols, mask=cols < K, other=0.0).to(tl.float32)
            total_b = sum_own(ahead, gb, own)
            weakest = tl.min(tl.minimum(total_f, total_b), 1)
        else:
            own_f = 2.0 * half_gates(gf, C, BV)
            own_b = 2.0 * half_gates(gb, C, BV)
            right = tl.dot(tl.trans(v), k_f, right * tl.exp2(own_f), input_precision=PRECISION)
            # Decayed by what lies left of the chunk, so that the walk is the same.
            added = tl.dot(tl.trans(v), k_b_, input_precision=PRECISION)
            left += added * tl.exp2(total_b)
            total_f += own_f
            total_b += own_b
            weakest = tl.minimum(weakest, tl.min(tl.minimum(own_f, own_b), 1))
    slot = offset(head, n_segments) + i_s
    flow = offset(tl.num_programs(0), n_segments)
    cols = tl.arange(0, BK)[None, :]
    rows = tl.arange(0, total_f.shape[0])[:, None]
    once = (rows == 0) & (cols < K) & (v0 == 0)
    tl.store(p_decays + slot * K + (cols + 0 * rows), total_f, mask=once)
    if FLAT:
        once = (rows == tl.minimum(n, C) - 1) & (cols < K) & (v0 == 0)
    tl.store(p_decays + (flow + slot) * K + (cols + 0 * rows), total_b, mask=once)
    tl.store(p_weakest + slot, tl.min(weakest), mask=v0 == 0)
    put_state(p_adds + slot * (K * V), right, K, V, v0, 0, BV, BK)
    put_state(p_adds + (flow + slot) * (K * V), left, K, V, v0, 0, BV, BK)


@kernel(sizes=['n_segments', 'n_chunks', 'heads'])
def scan_kernel(
    p_adds, p_decays, p_right, p_stack, n_segments, n_chunks, heads,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From what segments add, (flow, B*H, segment, V, K), to the states that enter them.

    Rightward ones go to (B*H, segment, V, K), leftward ones to the segment's last chunk in
    (B*H, chunk, V, K).
    """
    await_previous()
    leftward = tl.program_id(1)
    head = tl.program_id(2)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < K * V
    first = offset(leftward * heads + head, n_segments)
    p_adds += first * (K * V)
    p_decays += first * K
    if leftward == 1:
        p_out = p_stack + offset(head, n_chunks) * (K * V)
    else:
        p_out = p_right + offset(head, n_segments) * (K * V)
    state = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(n_segments, num_stages=STAGES):
        i_s = tl.where(leftward == 1, n_segments - 1 - step, step)
        added = tl.load(p_adds + offset(i_s, K * V) + e, mask=mask, other=0.0)
        decay = tl.load(p_decays + offset(i_s, K) + e % K, mask=mask, other=0.0)
        begin, size = segment_chunks(i_s, n_segments, n_chunks)
        slot = tl.where(leftward == 1, begin + size - 1, i_s)
        tl.store(p_out + offset(slot, K * V) + e, state.to(p_out.dtype.element_ty), mask=mask)
        state = state * tl.exp2(decay) + added.to(tl.float32)


@kernel(sizes=['N', 'H', 'n_segments', 'n_chunks'])
def out_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_o, p_right, p_stack, p_weakest, p_table, bits,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, n_segments, n_chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr, FLAT: tl.constexpr,
    SETTLE: tl.constexpr,
):  # fmt: skip
    """o_i = sum_j A_ij v_j + q_i exp(c_i) S_f + q_i exp(d_i) S_b, q times 2 to the `bits`.

    q, k, gates (B, N, H, K), v, o (B, N, H, V), o contiguous; right (B*H, segment, V, K), the
    S_f that enter; stack (B*H, chunk, V, K), in which the last chunk of each segment has the S_b
    that enters, and which takes those of the others. Without states (`HAS_STATES`) it writes
    weakest, as `adds_kernel` does. Segments whose chunks decay by more than MAX_BITS get nonsense,
    which `exact_kernel` overwrites. Program: (head, segment, V block); accumulation in float32.
    """
    await_previous()
    head = tl.program_id(0)
    b = head // H
    h = head % H
    i_s = tl.program_id(1)
    v0 = tl.program_id(2) * BV
    first, size = segment_chunks(i_s, n_segments, n_chunks)
    if FLAT:
        first = i_s
    t = first * C
    n = N - t
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    p_q += offset(b, q_b) + offset(t, q_n) + offset(h, q_h)
    p_k += offset(b, k_b) + offset(t, k_n) + offset(h, k_h)
    p_v += offset(b, v_b) + offset(t, v_n) + offset(h, v_h) + v0
    p_gf += offset(b, gf_b) + offset(t, gf_n) + offset(h, gf_h)
    p_gb += offset(b, gb_b) + offset(t, gb_n) + offset(h, gb_h)
    p_o += ((offset(b, N) + t) * H + h) * V + v0
    slot = offset(head, n_segments) + i_s
    p_stack += (offset(head, n_chunks) + first) * (K * V)
    zero = tl.minimum(N, 0)
    z = 0
    upto = table(p_table, C, 0)
    since = table(p_table, C, 1)
    if HAS_STATES:
        s_f = get_state(p_right + slot * (K * V), K, V, v0, 0, BV, BK)
        if not FLAT:
            s_f = s_f.to(tl.float32)
    else:
        s_f = tl.zeros((BV, BK), tl.float32)
        weakest = tl.zeros((C,), tl.float32)
    if not FLAT:
        if HAS_STATES:
            s_b = get_state(p_stack + (size - 1) * (K * V), K, V, v0, 0, BV, BK).to(tl.float32)
        else:
            s_b = tl.zeros((BV, BK), tl.float32)
            put_state(p_stack + (size - 1) * (K * V), s_b, K, V, v0, 0, BV, BK)
        for step in range(size - 1):
            i_c = size - 1 - step
            z = (i_c & zero) * 64
            t = i_c * C
            gb = get(p_gb + offset(t, gb_n), gb_n, n - t, K, z, C, BK, mask_k)
            v = get(p_v + offset(t, v_n), v_n, n - t, V - v0, z, C, BV, mask_v)
            k = get(p_k + offset(t, k_n), k_n, n - t, K, z, C, BK, mask_k)
            if SETTLE:
                k = late(k, zero)
            k = decayed(k, -sum_gates(since, gb), OP)
            e = tl.exp2(2.0 * half_gates(gb, C, BV))
            s_b = tl.dot(tl.trans(v.to(OP)), k, s_b, input_precision=PRECISION) * e
            put_state(p_stack + (i_c - 1) * (K * V), s_b, K, V, v0, z, BV, BK)
        # Other threads of this program read what was stacked.
        tl.debug_barrier()
    for i_c in range(1 if FLAT else size):
        if not FLAT:
            z = (i_c & zero) * 64
        t = i_c * C
        left = n - t
        gf = get(p_gf + offset(t, gf_n), gf_n, left, K, z, C, BK, mask_k)
        gb = get(p_gb + offset(t, gb_n), gb_n, left, K, z, C, BK, mask_k)
        s_b_in = get_state(p_stack + i_c * (K * V), K, V, v0, z, BV, BK)
        v = get(p_v + offset(t, v_n), v_n, left, V - v0, z, C, BV, mask_v)
        q = get(p_q + offset(t, q_n), q_n, left, K, z, C, BK, mask_k)
        k = get(p_k + offset(t, k_n), k_n, left, K, z, C, BK, mask_k)
        if SETTLE:
            q = late(q, zero)
            k = late(k, zero)
        v = v.to(OP)
        c = sum_gates(upto, gf)
        d = sum_gates(since, gb)
        if not HAS_STATES:
            weakest = tl.minimum(weakest, tl.min(tl.minimum(c, d), 1))
        q_f = decayed(q, c + bits, OP)
        k_f = decayed(k, -c, OP)
        q_b_ = decayed(q, d + bits, OP)
        k_b_ = decayed(k, -d, OP)
        a_f = tl.dot(q_f, tl.trans(k_f), input_precision=PRECISION)
        a_b = tl.dot(q_b_, tl.trans(k_b_), input_precision=PRECISION)
        a = merge(a_f, a_b, z, OP)
        o = tl.dot(a, v, input_precision=PRECISION)
        o = tl.dot(q_b_, tl.trans(s_b_in), o, input_precision=PRECISION)
        o = tl.dot(q_f, tl.trans(s_f.to(OP)), o, input_precision=PRECISION)
        if not FLAT:
            e = tl.exp2(2.0 * half_gates(gf, C, BV))
            s_f = tl.dot(tl.trans(v), k_f, s_f, input_precision=PRECISION) * e
        put(p_o + offset(t, H * V), o, H * V, left, V - v0, z, C, BV, mask_v)
    if not HAS_STATES:
        tl.store(p_weakest + slot, tl.min(weakest))


@lru_cache(maxsize=1024)
def segment_length(n_chunks: int, heads: int, slots: int) -> int:
    """Chunks of a segment for so many chunks a head and multiprocessors."""
    if n_chunks <= ONE_SEGMENT and heads >= 2 * slots:
        return n_chunks
    share = n_chunks * heads / slots
    return min(n_chunks, next(chunks for most, chunks in LENGTHS if share <= most))


def forward_from_edges(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float,
    chunk: int | None = None, chunks: int | None = None,
) -> Tensor:  # fmt: skip
    """Launches the forward.

    Args:
        q, k, v, gf, gb: As in `bidirectional_gla`, last dims contiguous; gates of half precision.
        scale: Factor of q, positive.
        chunk, chunks: Tokens of a chunk and chunks of a segment, where not those of the plan.
    """
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    p = make_plan(q, v)
    chunk = chunk or p.chunk
    n_chunks = ceil_div(n, chunk)
    chunks = min(chunks or segment_length(n_chunks, b * h, multiprocessors(q.device)), n_chunks)
    n_segments = ceil_div(n_chunks, chunks)
    several = n_segments > 1
    flat = several and chunks == 1
    options = FLAT if flat else SHORT if chunks <= 2 else LONG
    dims = dict(K=dk, V=dv, BK=p.block_k, BV=p.block_v, C=chunk, OP=p.op, PRECISION=p.precision)
    form = dict(FLAT=flat, SETTLE=options['num_stages'] == 1)
    grid = (b * h, n_segments, ceil_div(dv, p.block_v))
    sizes = (n, h, n_segments, n_chunks)
    inputs = (q, k, v, gf, gb)
    o = q.new_empty(b, n, h, dv)
    right = q.new_empty(b * h, n_segments if several else 0, dv, dk, dtype=p.torch_op)
    stack = q.new_empty(b * h, n_chunks, dv, dk, dtype=p.torch_op)
    weakest = q.new_empty(b * h, n_segments, dtype=torch.float32)
    table = triangles(chunk, q.device)
    if several:
        added = q.new_empty(2, b * h, n_segments, dv, dk, dtype=p.torch_op)
        decays = q.new_empty(2, b * h, n_segments, dk, dtype=torch.float32)
        adds_kernel[grid](
            k, v, gf, gb, added, decays, weakest, table, *strides(k, v, gf, gb), *sizes, **dims,
            **form, **options,
        )  # fmt: skip
        scan_kernel[ceil_div(dk * dv, 128), 2, b * h](
            added, decays, right, stack, n_segments, n_chunks, b * h, dk, dv, BLOCK=128,
            STAGES=8, num_warps=1,
        )  # fmt: skip
    bits = math.log2(0.5 * scale)
    out_kernel[grid](
        *inputs, o, right, stack, weakest, table, bits, *strides(*inputs), *sizes, **dims,
        HAS_STATES=several, **form, **options,
    )  # fmt: skip
    launch_exact(
        inputs, (o, right, stack, weakest), bits, sizes, grid[2],
        **dims, HAS_STATES=several, **p.exact,
    )  # fmt: skip
    return o
