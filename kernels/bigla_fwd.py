"""Forward of `bidirectional_gla` in Triton: kernels and launcher. Notation: `bigla_tiles.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.bigla_plan import Plan, make_plan
from mmvig.kernels.bigla_tiles import (
    LOG2E,
    MAX_CHUNK_BITS,
    before,
    load_state,
    load_tile,
    reduce_segment,
    scan_states_kernel,
    store_state,
    store_states,
    store_tile,
    sum_gates,
    total_gate,
)


@triton.jit(do_not_specialize=['N', 'H', 'segment', 'n_segments'])
def segment_states_kernel(
    p_k, p_v, p_gf, p_gb, p_states, p_decays,
    k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, segment, n_segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to S_f and S_b, and its decays. Program: (head, segment, V block)."""
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i_s = tl.program_id(1)
    v0 = tl.program_id(2) * BV
    t = i_s.to(tl.int64) * segment
    n = tl.minimum(segment, N - i_s * segment)
    right, left, right_total, left_total = reduce_segment(
        p_k + b * k_b + t * k_n + h * k_h, p_v + b * v_b + t * v_n + h * v_h,
        p_gf + b * gf_b + t * gf_n + h * gf_h, p_gb + b * gb_b + t * gb_n + h * gb_h,
        k_n, v_n, gf_n, gb_n, n, K, V, v0, C, BK, BV, BK != K, V % BV != 0, OP, PRECISION, False,
    )  # fmt: skip
    slot = head.to(tl.int64) * n_segments + i_s
    flow = tl.num_programs(0).to(tl.int64) * n_segments
    store_states(
        p_states, p_decays, right, left, right_total, left_total, flow, slot, 0, v0,
        K, V, BK, BV, True,
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


@triton.jit(do_not_specialize=['N', 'H', 'n_segments', 'n_chunks', 'chunks'])
def output_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_o, p_states, p_stack, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, n_segments, n_chunks, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """o_i = scale (sum_j A_ij v_j + q_i exp(c_i) S_f + q_i exp(d_i) S_b), A of both directions.

    q, k, gates (B, N, H, K), v, o (B, N, H, V), o contiguous; states (2, B*H, segment, V, K)
    float32, those that enter each segment; stack (B*H, chunk, V, K) is scratch of dtype OP.
    A program (head, segment, V block) walks its chunks right to left, stacking S_b, then left to
    right with S_f in registers. One (C, C) tile holds the scores of both directions. Products
    accumulate in float32.
    """
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
    p_stack += head.to(tl.int64) * n_chunks * K * V
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    rows = tl.arange(0, C)
    wide = tl.zeros((), tl.int64)

    if HAS_STATES:
        slot = head.to(tl.int64) * n_segments + i_s
        flow = tl.num_programs(0).to(tl.int64) * n_segments * K * V
        s_f = load_state(p_states + slot * K * V, K, V, v0, BK, BV)
        s_b = load_state(p_states + slot * K * V + flow, K, V, v0, BK, BV)
    else:
        s_f = tl.zeros((BV, BK), tl.float32)
        s_b = tl.zeros((BV, BK), tl.float32)

    for step in range(last - first):
        i_c = last - step
        store_state(p_stack + (wide + i_c) * K * V, s_b, K, V, v0, BK, BV)
        t = (wide + i_c) * C
        n = N - i_c * C
        k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
        v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        k_left = (k * tl.exp2(before(sum_gates(gb, C, False), gb))).to(OP)
        s_b *= tl.exp2(total_gate(gb))[None, :]
        s_b = tl.dot(tl.trans(v), k_left, s_b, input_precision=PRECISION)
    # Other threads of this program read what was stacked.
    tl.debug_barrier()

    s_b = s_b.to(OP)
    for i_c in range(first, last + 1):
        t = (wide + i_c) * C
        n = N - i_c * C
        q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
        k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
        v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
        gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        c = sum_gates(gf, C, False)
        d = sum_gates(gb, C, True)
        c_all = total_gate(gf)
        d_all = total_gate(gb)
        if tl.min(tl.minimum(c_all, d_all), 0) > -MAX_CHUNK_BITS:
            # Both factors of exp(c_i - c_j) are taken from the middle of the chunk's decay.
            m_f = 0.5 * c_all
            m_b = 0.5 * d_all
            c -= m_f[None, :]
            d -= m_b[None, :]
            to_f = (q * tl.exp2(c)).to(OP)
            to_b = (q * tl.exp2(d)).to(OP)
            from_f = (k * tl.exp2(-c)).to(OP)
            from_b = (k * tl.exp2(-d)).to(OP)
            a_f = tl.dot(to_f, tl.trans(from_f), input_precision=PRECISION)
            a_b = tl.dot(to_b, tl.trans(from_b), input_precision=PRECISION)
            a = tl.where(rows[:, None] >= rows[None, :], a_f, 0.0)
            a += tl.where(rows[:, None] <= rows[None, :], a_b, 0.0)
        else:
            m_f = tl.zeros((BK,), tl.float32)
            m_b = tl.zeros((BK,), tl.float32)
            to_f = (q * tl.exp2(c)).to(OP)
            to_b = (q * tl.exp2(d)).to(OP)
            from_f = (k * tl.exp2(before(sum_gates(gf, C, True), gf))).to(OP)
            a = tl.zeros((C, C), tl.float32)
            p_kt = p_k + t * k_n
            a = exact_scores(a, q, p_kt, p_gf + t * gf_n, k_n, gf_n, n, K, C, BK, False)
            a = exact_scores(a, q, p_kt, p_gb + t * gb_n, k_n, gb_n, n, K, C, BK, True)
        e_f = tl.exp2(m_f)[None, :]
        o = tl.dot(a.to(OP), v, input_precision=PRECISION)
        o = tl.dot(to_f, tl.trans((s_f * e_f).to(OP)), o, input_precision=PRECISION)
        s = (s_b.to(tl.float32) * tl.exp2(m_b)[None, :]).to(OP)
        o = tl.dot(to_b, tl.trans(s), o, input_precision=PRECISION)
        store_tile(p_o + t * H * V, o * scale, H * V, n, V - v0, C, BV, mask_v)
        new = tl.dot(tl.trans(v), from_f, input_precision=PRECISION)
        s_f = s_f * tl.exp2(c_all)[None, :] + new * e_f
        p_next = p_stack + (wide + i_c + 1) * K * V
        s_b = load_state(p_next, K, V, v0, BK, BV, i_c < last)


def strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head strides of (B, N, H, D) tensors, in the order of the kernels."""
    return [s for x in tensors for s in x.stride()[:3]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float, plan: Plan | None = None
) -> Tensor:
    """Launches the forward; arguments as in `bidirectional_gla`, last dims contiguous."""
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    p = plan or make_plan(b, n, h, dk, dv, q.dtype, q.device)
    o = torch.empty(b, n, h, dv, dtype=q.dtype, device=q.device)
    n_chunks = triton.cdiv(n, p.chunk)
    n_segments = triton.cdiv(n_chunks, p.chunks)
    dims = dict(K=dk, V=dv, BK=p.block_k, BV=p.block_v, C=p.chunk, OP=p.op, PRECISION=p.precision)
    grid = (b * h, n_segments, triton.cdiv(dv, p.block_v))
    states = o.new_empty(2 if n_segments > 1 else 0, b * h, n_segments, dv, dk, dtype=torch.float32)
    if n_segments > 1:
        decays = o.new_empty(2, b * h, n_segments, dk, dtype=torch.float32)
        segment_states_kernel[grid](
            k, v, gf, gb, states, decays, *strides(k, v, gf, gb),
            n, h, p.chunks * p.chunk, n_segments, **dims, **p.reduce,
        )  # fmt: skip
        scan_states(states, decays)
    stack = o.new_empty(b * h, n_chunks if p.chunks > 1 else 0, dv, dk, dtype=p.torch_op)
    output_kernel[grid](
        q, k, v, gf, gb, o, states, stack, 0.5 * scale, *strides(q, k, v, gf, gb),
        n, h, n_segments, n_chunks, p.chunks, **dims, HAS_STATES=n_segments > 1,
        **p.output,
    )  # fmt: skip
    return o


def scan_states(states: Tensor, decays: Tensor) -> None:
    """Launches `scan_states_kernel` over (flow, B*H, segment, V, K) states, in place."""
    flows, heads, n_segments, dv, dk = states.shape
    block = 128
    scan_states_kernel[triton.cdiv(dk * dv, block), flows, heads](
        states, decays, n_segments, heads, dk, dv, BLOCK=block, num_warps=1
    )
