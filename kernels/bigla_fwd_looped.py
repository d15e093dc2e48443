"""Forward of `bidirectional_gla` by segments, for all inputs: kernels and launcher.

Notation: `bigla_tiles.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.bigla_plan import make_plan
from mmvig.kernels.bigla_tiles import (
    LOG2E,
    MAX_CHUNK_BITS,
    after,
    before,
    half_gates,
    load_state,
    load_tile,
    reduce_segment,
    scan_gates,
    scan_states,
    store_state,
    store_states,
    store_tile,
    strides,
    sum_gates,
)
from mmvig.kernels.grid import ceil_div
from mmvig.kernels.launch import await_previous, kernel


@kernel(sizes=['N', 'H', 'segment', 'n_segments'])
def segment_states_kernel(
    p_k, p_v, p_gf, p_gb, p_states, p_decays, p_weakest,
    k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, segment, n_segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to S_f and S_b, and its decays. Program: (head, segment, V block)."""
    await_previous()
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i_s = tl.program_id(1)
    v0 = tl.program_id(2) * BV
    t = i_s.to(tl.int64) * segment
    n = tl.minimum(segment, N - i_s * segment)
    right, left, right_total, left_total, weakest = reduce_segment(
        p_k + b * k_b + t * k_n + h * k_h, p_v + b * v_b + t * v_n + h * v_h,
        p_gf + b * gf_b + t * gf_n + h * gf_h, p_gb + b * gb_b + t * gb_n + h * gb_h,
        k_n, v_n, gf_n, gb_n, n, K, V, v0, C, BK, BV, BK != K, V % BV != 0, OP, PRECISION, False,
    )  # fmt: skip
    slot = head.to(tl.int64) * n_segments + i_s
    flow = tl.num_programs(0).to(tl.int64) * n_segments
    store_states(
        p_states, p_decays, p_weakest, right, left, right_total, left_total, weakest, flow, slot,
        0, v0, K, V, BK, BV, True,
    )  # fmt: skip


@triton.jit
def exact_scores(
    a, q, p_k, p_g, k_stride, g_stride, n, K,
    C: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Adds one direction's (C, C) scores to `a`, column by column, for gates of any size.

    Keeps the decay from token j to every token that it reaches, and moves j one token at a time
    against the direction, multiplying by one gate: no exponent is ever positive and none is a
    difference of large sums.
    """
    rows = tl.arange(0, C)
    cols = tl.arange(0, BK)
    reach = tl.zeros((C, BK), tl.float32)
    for step in range(C):
        j = step if REVERSE else C - 1 - step
        last = j - 1 if REVERSE else j + 1
        p = p_g + last * g_stride + cols
        g = tl.load(p, mask=(cols < K) & (last >= 0) & (last < n), other=0.0).to(tl.float32)
        k = tl.load(p_k + j * k_stride + cols, mask=(cols < K) & (j < n), other=0.0)
        reach = tl.where(rows[:, None] == j, 1.0, reach * tl.exp2(g * LOG2E)[None, :])
        column = tl.sum(q * reach * k.to(tl.float32)[None, :], 1)
        a += tl.where(rows[None, :] == j, column[:, None], 0.0)
    return a


@kernel(sizes=['N', 'H', 'n_segments', 'n_chunks', 'chunks'])
def output_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_o, p_states, p_weakest, p_stack, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, n_segments, n_chunks, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """o_i = scale (sum_j A_ij v_j + q_i exp(c_i) S_f + q_i exp(d_i) S_b), A of both directions.

    q, k, gates (B, N, H, K), v, o (B, N, H, V), o contiguous; states (2, B*H, segment, V, K)
    float32, those that enter each segment; stack (B*H, chunk, V, K) is scratch of dtype OP.
    A program (head, segment, V block) walks its chunks right to left, stacking S_b, then left to
    right with S_f in registers. One (C, C) tile holds the scores of both directions. Products
    accumulate in float32.

    Launched twice: first for the segments whose gates allow the factored form, then, `EXACT`, for
    the others, whose programs alone do more than look at `weakest` (B*H, segment): half the
    strongest decay of a chunk, in bits, which the first launch finds if there are no states.
    """
    await_previous()
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i_s = tl.program_id(1)
    v0 = tl.program_id(2) * BV
    first = i_s * chunks
    last = tl.minimum(first + chunks, n_chunks) - 1
    p_q += b * q_b + h * q_h
    p_k += b * k_b + h * k_h
    p_v += b * v_b + h * v_h + v0
    p_gf += b * gf_b + h * gf_h
    p_gb += b * gb_b + h * gb_h
    p_o += (b * N * H + h) * V + v0
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    rows = tl.arange(0, C)
    wide = tl.zeros((), tl.int64)

    slot = head.to(tl.int64) * n_segments + i_s
    if HAS_STATES or EXACT:
        factors = tl.load(p_weakest + slot) > -0.5 * MAX_CHUNK_BITS
        if factors == EXACT:
            return
    weakest = tl.zeros((BV, BK), tl.float32)
    if HAS_STATES:
        flow = tl.num_programs(0).to(tl.int64) * n_segments * K * V
        s_f = load_state(p_states + slot * K * V, K, V, v0, BK, BV)
        s_b = load_state(p_states + slot * K * V + flow, K, V, v0, BK, BV)
    else:
        s_f = tl.zeros((BV, BK), tl.float32)
        s_b = tl.zeros((BV, BK), tl.float32)

    p_stack += ((wide + head) * n_chunks + first) * K * V
    store_state(p_stack + (wide + last - first) * K * V, s_b, K, V, v0, BK, BV)
    strictly_before = before(C, True)
    for step in range(last - first):
        i_c = last - step
        t = (wide + i_c) * C
        n = N - i_c * C
        k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
        v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        k = (k * tl.exp2(sum_gates(strictly_before, gb))).to(OP)
        half_b = half_gates(gb, C, BV)
        s_b = tl.dot(tl.trans(v), k, s_b * tl.exp2(2.0 * half_b), input_precision=PRECISION)
        store_state(p_stack + (wide + i_c - 1 - first) * K * V, s_b, K, V, v0, BK, BV)
        if not (HAS_STATES or EXACT):
            gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
            weakest = tl.minimum(weakest, tl.minimum(half_gates(gf, C, BV), half_b))
    # Other threads of this program read what was stacked.
    tl.debug_barrier()

    if EXACT:
        for i_c in range(first, last + 1):
            t = (wide + i_c) * C
            n = N - i_c * C
            q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
            k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
            v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
            gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
            gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
            s_b_in = load_state(p_stack + (wide + i_c - first) * K * V, K, V, v0, BK, BV)
            a = tl.zeros((C, C), tl.float32)
            p_kt = p_k + t * k_n
            a = exact_scores(a, q, p_kt, p_gf + t * gf_n, k_n, gf_n, n, K, C, BK, False)
            a = exact_scores(a, q, p_kt, p_gb + t * gb_n, k_n, gb_n, n, K, C, BK, True)
            o = tl.dot(a.to(OP), v, input_precision=PRECISION)
            q_f = (q * tl.exp2(scan_gates(gf, False, False))).to(OP)
            o = tl.dot(q_f, tl.trans(s_f.to(OP)), o, input_precision=PRECISION)
            q_b_ = (q * tl.exp2(scan_gates(gb, True, False))).to(OP)
            o = tl.dot(q_b_, tl.trans(s_b_in), o, input_precision=PRECISION)
            store_tile(p_o + t * H * V, o * scale, H * V, n, V - v0, C, BV, mask_v)
            k = (k * tl.exp2(scan_gates(gf, True, True))).to(OP)
            s_f *= tl.exp2(2.0 * half_gates(gf, C, BV))
            s_f = tl.dot(tl.trans(v), k, s_f, input_precision=PRECISION)
        return
    if not HAS_STATES:
        t = (wide + first) * C
        n = N - first * C
        gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        weakest = tl.minimum(weakest, tl.minimum(half_gates(gf, C, BV), half_gates(gb, C, BV)))
        half = tl.min(weakest)
        tl.store(p_weakest + slot, half)
        if half <= -0.5 * MAX_CHUNK_BITS:
            return
    # Sums up to a token less half of all: decays measured from the middle of the chunk's decay.
    from_middle_f = before(C, False, 0.5)
    from_middle_b = after(C, False, 0.5)
    for i_c in range(first, last + 1):
        t = (wide + i_c) * C
        n = N - i_c * C
        q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
        k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
        v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
        gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        s_b_in = load_state(p_stack + (wide + i_c - first) * K * V, K, V, v0, BK, BV)
        c = sum_gates(from_middle_f, gf)
        q_f = (q * tl.exp2(c)).to(OP)
        k_f = (k * tl.exp2(-c)).to(OP)
        a_f = tl.dot(q_f, tl.trans(k_f), input_precision=PRECISION)
        d = sum_gates(from_middle_b, gb)
        q_b_ = (q * tl.exp2(d)).to(OP)
        k_b_ = (k * tl.exp2(-d)).to(OP)
        a_b = tl.dot(q_b_, tl.trans(k_b_), input_precision=PRECISION)
        a = tl.where(rows[:, None] >= rows[None, :], a_f, 0.0)
        a += tl.where(rows[:, None] <= rows[None, :], a_b, 0.0)
        o = tl.dot(a.to(OP), v, input_precision=PRECISION)
        e_f = tl.exp2(half_gates(gf, C, BV))
        s_f *= e_f
        o = tl.dot(q_f, tl.trans(s_f.to(OP)), o, input_precision=PRECISION)
        s = (s_b_in.to(tl.float32) * tl.exp2(half_gates(gb, C, BV))).to(OP)
        o = tl.dot(q_b_, tl.trans(s), o, input_precision=PRECISION)
        s_f = tl.dot(tl.trans(v), k_f, s_f, input_precision=PRECISION) * e_f
        store_tile(p_o + t * H * V, o * scale, H * V, n, V - v0, C, BV, mask_v)


def forward_looped(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float,
    chunk: int | None = None, chunks: int | None = None,
) -> Tensor:  # fmt: skip
    """Launches the forward; arguments as of `bigla_fwd.forward`."""
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    p = make_plan(q, v, chunk, chunks)
    o = torch.empty(b, n, h, dv, dtype=q.dtype, device=q.device)
    n_chunks = ceil_div(n, p.chunk)
    n_segments = ceil_div(n_chunks, p.chunks)
    dims = dict(K=dk, V=dv, BK=p.block_k, BV=p.block_v, C=p.chunk, OP=p.op, PRECISION=p.precision)
    grid = (b * h, n_segments, ceil_div(dv, p.block_v))
    states = o.new_empty(2 if n_segments > 1 else 0, b * h, n_segments, dv, dk, dtype=torch.float32)
    weakest = states.new_empty(b * h, n_segments)
    if n_segments > 1:
        decays = o.new_empty(2, b * h, n_segments, dk, dtype=torch.float32)
        segment_states_kernel[grid](
            k, v, gf, gb, states, decays, weakest, *strides(k, v, gf, gb),
            n, h, p.chunks * p.chunk, n_segments, **dims, **p.reduce,
        )  # fmt: skip
        scan_states(states, decays)
    stack = o.new_empty(b * h, n_chunks, dv, dk, dtype=p.torch_op)
    for exact in (False, True):
        output_kernel[grid](
            q, k, v, gf, gb, o, states, weakest, stack, 0.5 * scale, *strides(q, k, v, gf, gb),
            n, h, n_segments, n_chunks, p.chunks, **dims, HAS_STATES=n_segments > 1, EXACT=exact,
            **(p.exact if exact else p.output),
        )  # fmt: skip
    return o
