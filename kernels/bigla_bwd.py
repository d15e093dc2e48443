"""Backward of `bidirectional_gla` in Triton: kernels and launcher. Notation: `bigla_tiles.py`.

The gradient of a gate needs no extra products: with dc_i = q_i dq_i - k_i dk_i (per key channel,
of one direction), the gradient of g_fwd at t is the sum of dc_i over i >= t. Beyond the end of a
chunk that sum is the row sum of S_f * dS_f there, both of which are at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.bigla_fwd import scan_states, strides
from mmvig.kernels.bigla_plan import Plan, make_plan
from mmvig.kernels.bigla_tiles import (
    LOG2E,
    MAX_CHUNK_BITS,
    load_tile,
    reduce_segment,
    state_tile,
    store_tile,
    sum_gates,
)


@triton.jit
def store_states(
    p_states, p_decays, right, left, right_total, left_total, flow, slot, first_flow, v0,
    K, V, BK: tl.constexpr, BV: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Writes what `reduce_segment` returned as flows `first_flow` (right) and the next (left)."""
    p, mask = state_tile(p_states + (first_flow * flow + slot) * K * V, K, V, v0, BK, BV, False)
    tl.store(p, right, mask=mask)
    tl.store(p + flow * K * V, left, mask=mask)
    if DECAYS:
        cols = tl.arange(0, BK)
        mask = (cols < K) & (v0 == 0)
        tl.store(p_decays + slot * K + cols, right_total, mask=mask)
        tl.store(p_decays + (flow + slot) * K + cols, left_total, mask=mask)


@triton.jit(do_not_specialize=['N', 'H', 'segment', 'n_segments'])
def all_segment_states_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_states, p_decays,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, N, H, segment, n_segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to all four states. Program: (head, segment, V block x 2 pairs)."""
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i_s = tl.program_id(1)
    v0 = tl.program_id(2) // 2 * BV
    t = i_s.to(tl.int64) * segment
    n = tl.minimum(segment, N - i_s * segment)
    p_gf += b * gf_b + t * gf_n + h * gf_h
    p_gb += b * gb_b + t * gb_n + h * gb_h
    slot = head.to(tl.int64) * n_segments + i_s
    flow = tl.num_programs(0).to(tl.int64) * n_segments
    if tl.program_id(2) % 2 == 0:
        right, left, right_total, left_total = reduce_segment(
            p_k + b * k_b + t * k_n + h * k_h, p_v + b * v_b + t * v_n + h * v_h, p_gf, p_gb,
            k_n, v_n, gf_n, gb_n, n, K, V, v0, C, BK, BV, BK != K, V % BV != 0, OP, PRECISION,
            False,
        )  # fmt: skip
        store_states(
            p_states, p_decays, right, left, right_total, left_total, flow, slot, 0, v0,
            K, V, BK, BV, True,
        )  # fmt: skip
    else:
        right, left, right_total, left_total = reduce_segment(
            p_q + b * q_b + t * q_n + h * q_h, p_do + b * do_b + t * do_n + h * do_h, p_gb, p_gf,
            q_n, do_n, gb_n, gf_n, n, K, V, v0, C, BK, BV, BK != K, V % BV != 0, OP, PRECISION,
            True,
        )  # fmt: skip
        store_states(
            p_states, p_decays, right, left, right_total, left_total, flow, slot, 2, v0,
            K, V, BK, BV, False,
        )  # fmt: skip


@triton.jit
def exact_grads(
    at, da, q, p_k, p_g, k_stride, g_stride, n, K,
    C: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """One direction within a chunk for gates of any size; walks as `exact_scores` does.

    Adds its scores to `at` ((C, C), row j gives), and returns the gradients of q and k through
    them, float32 (C, BK), from `da`, that of the scores ((C, C), row i receives).
    """
    rows = tl.arange(0, C)
    cols = tl.arange(0, BK)
    reach = tl.zeros((C, BK), tl.float32)
    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    for step in range(C):
        j = step if REVERSE else C - 1 - step
        last = j - 1 if REVERSE else j + 1
        p = p_g + last * g_stride + cols
        g = tl.load(p, mask=(cols < K) & (last >= 0) & (last < n), other=0.0).to(tl.float32)
        k = tl.load(p_k + j * k_stride + cols, mask=(cols < K) & (j < n), other=0.0).to(tl.float32)
        reach = tl.where(rows[:, None] == j, 1.0, reach * tl.exp2(g * LOG2E)[None, :])
        q_j = q * reach
        given = tl.sum(q_j * k[None, :], 1)
        at += tl.where(rows[:, None] == j, given[None, :], 0.0)
        da_j = tl.sum(tl.where(rows[None, :] == j, da, 0.0), 1)
        dq += da_j[:, None] * reach * k[None, :]
        dk += tl.where(rows[:, None] == j, tl.sum(da_j[:, None] * q_j, 0)[None, :], 0.0)
    return at, dq, dk


@triton.jit
def sum_tokens(x, C: tl.constexpr, REVERSE: tl.constexpr, OP: tl.constexpr):
    """Inclusive running sums of a float32 (C, BK) tile along the tokens.

    Where products are in bfloat16, by two of them with a triangle of ones, of x's leading and
    following 8 bits: rounding error 2^-17 of each x.
    """
    if OP == tl.float32:
        return tl.cumsum(x, 0, reverse=REVERSE)
    else:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        ones = ((j >= i) if REVERSE else (j <= i)).to(OP)
        high = x.to(OP)
        low = (x - high.to(tl.float32)).to(OP)
        return tl.dot(ones, low, tl.dot(ones, high))


@triton.jit(do_not_specialize=['B', 'N', 'H', 'n_segments', 'n_chunks', 'chunks'])
def grad_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_dq, p_dk, p_dv, p_dgf, p_dgb, p_states, p_stack, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, B, N, H, n_segments, n_chunks, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """All five gradients of one segment of one head, from one block of value channels.

    Inputs as in `output_kernel`; states (4, B*H, segment, K, V) float32, those that enter each
    segment, flows as in `scan_states_kernel`; stack (2, B*H, chunk, K, V), scratch of dtype OP for
    S_b and dS_f. dv (B, N, H, V); dq, dk, dgf, dgb (V blocks, B, N, H, K): each block's share.
    Walks the chunks right to left, stacking the states that flow left, then left to right with
    those that flow right in registers. Products accumulate in float32.

    Both (C, C) score tiles are formed in the two orientations that the products need, never by
    transposing a product: that is miscompiled on Hopper by Triton 3.4 to 3.7.0.
    """
    head = tl.program_id(0)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i_s = tl.program_id(1)
    v0 = tl.program_id(2) * BV
    first = i_s * chunks
    last = tl.minimum(first + chunks, n_chunks) - 1
    wide = tl.zeros((), tl.int64)
    p_q += b * q_b + h * q_h
    p_k += b * k_b + h * k_h
    p_v += b * v_b + h * v_h + v0
    p_gf += b * gf_b + h * gf_h
    p_gb += b * gb_b + h * gb_h
    p_do += b * do_b + h * do_h + v0
    p_dv += (b * N * H + h) * V + v0
    share = (((wide + tl.program_id(2)) * B + b) * N * H + h) * K
    p_dq += share
    p_dk += share
    p_dgf += share
    p_dgb += share
    p_stack += (wide + head) * n_chunks * K * V
    stack = (wide + tl.num_programs(0)) * n_chunks * K * V
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    rows = tl.arange(0, C)

    # Suffix _t: transposed, (BV, BK). b_b: row sum of S_b * dS_b at the left end of a chunk.
    if HAS_STATES:
        flow = (wide + tl.num_programs(0)) * n_segments * K * V
        slot = ((wide + head) * n_segments + i_s) * K * V
        p, mask = state_tile(p_states + slot, K, V, v0, BK, BV, False)
        s_b = tl.load(p + flow, mask=mask, other=0.0)
        ds_b = tl.load(p + 2 * flow, mask=mask, other=0.0)
        ds_f = tl.load(p + 3 * flow, mask=mask, other=0.0)
        b_b = tl.sum(tl.load(p + flow - K * V, mask=mask & (i_s > 0), other=0.0) * ds_b, 1)
        p, mask = state_tile(p_states + slot, K, V, v0, BK, BV, True)
        s_f_t = tl.load(p, mask=mask, other=0.0)
        ds_b_t = tl.load(p + 2 * flow, mask=mask, other=0.0)
    else:
        s_b = tl.zeros((BK, BV), tl.float32)
        ds_b = tl.zeros((BK, BV), tl.float32)
        ds_f = tl.zeros((BK, BV), tl.float32)
        b_b = tl.zeros((BK,), tl.float32)
        s_f_t = tl.zeros((BV, BK), tl.float32)
        ds_b_t = tl.zeros((BV, BK), tl.float32)

    for step in range(last - first + 1):
        i_c = last - step
        p, mask = state_tile(p_stack + (wide + i_c) * K * V, K, V, v0, BK, BV, False)
        tl.store(p, s_b.to(OP), mask=mask)
        tl.store(p + stack, ds_f.to(OP), mask=mask)
        if i_c > first:
            t = (wide + i_c) * C
            n = N - i_c * C
            k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
            v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
            gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
            k_left = (k * tl.exp2(sum_gates(gb, C, False, True))).to(OP)
            s_b *= tl.exp2(tl.sum(gb.to(tl.float32), 0) * LOG2E)[:, None]
            s_b = tl.dot(tl.trans(k_left), v, s_b, input_precision=PRECISION)
            q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
            do = load_tile(p_do + t * do_n, do_n, n, V - v0, C, BV, mask_v).to(OP)
            gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
            q_left = (q * tl.exp2(sum_gates(gf, C, False, False))).to(OP)
            ds_f *= tl.exp2(tl.sum(gf.to(tl.float32), 0) * LOG2E)[:, None]
            ds_f = tl.dot(tl.trans(q_left), do, ds_f, input_precision=PRECISION)
    # Other threads of this program read what was stacked.
    tl.debug_barrier()

    for i_c in range(first, last + 1):
        t = (wide + i_c) * C
        n = N - i_c * C
        q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
        k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
        v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
        do = load_tile(p_do + t * do_n, do_n, n, V - v0, C, BV, mask_v).to(OP)
        gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        p, mask = state_tile(p_stack + (wide + i_c) * K * V, K, V, v0, BK, BV, False)
        ds_f_c = tl.load(p + stack, mask=mask, other=0.0)
        p, mask = state_tile(p_stack + (wide + i_c) * K * V, K, V, v0, BK, BV, True)
        s_b_t = tl.load(p, mask=mask, other=0.0)
        ds_f_t = tl.load(p + stack, mask=mask, other=0.0)
        c = sum_gates(gf, C, False, False)
        d = sum_gates(gb, C, True, False)
        c_all = tl.sum(gf.to(tl.float32), 0) * LOG2E
        d_all = tl.sum(gb.to(tl.float32), 0) * LOG2E
        da = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if tl.min(tl.minimum(c_all, d_all), 0) > -MAX_CHUNK_BITS:
            m_f = 0.5 * c_all
            m_b = 0.5 * d_all
            c -= m_f[None, :]
            d -= m_b[None, :]
            q_f = (q * tl.exp2(c)).to(OP)
            k_f = (k * tl.exp2(-c)).to(OP)
            q_b_ = (q * tl.exp2(d)).to(OP)
            k_b_ = (k * tl.exp2(-d)).to(OP)
            # Row j gives, column i receives.
            a_f = tl.dot(k_f, tl.trans(q_f), input_precision=PRECISION)
            a_b = tl.dot(k_b_, tl.trans(q_b_), input_precision=PRECISION)
            at = tl.where(rows[:, None] <= rows[None, :], a_f, 0.0)
            at += tl.where(rows[:, None] >= rows[None, :], a_b, 0.0)
            da_f = tl.where(rows[:, None] >= rows[None, :], da, 0.0).to(OP)
            da_b = tl.where(rows[:, None] <= rows[None, :], da, 0.0).to(OP)
            f = tl.exp2(m_f)
            r = tl.exp2(m_b)
            dq_f = tl.dot(da_f, k_f, input_precision=PRECISION)
            dq_f = tl.dot(do, (s_f_t * f[None, :]).to(OP), dq_f, input_precision=PRECISION)
            dq_b = tl.dot(da_b, k_b_, input_precision=PRECISION)
            s = (s_b_t.to(tl.float32) * r[None, :]).to(OP)
            dq_b = tl.dot(do, s, dq_b, input_precision=PRECISION)
            dat = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dat_f = tl.where(rows[:, None] <= rows[None, :], dat, 0.0).to(OP)
            dat_b = tl.where(rows[:, None] >= rows[None, :], dat, 0.0).to(OP)
            dk_f = tl.dot(dat_f, q_f, input_precision=PRECISION)
            s = (ds_f_t.to(tl.float32) * f[None, :]).to(OP)
            dk_f = tl.dot(v, s, dk_f, input_precision=PRECISION)
            dk_b = tl.dot(dat_b, q_b_, input_precision=PRECISION)
            dk_b = tl.dot(v, (ds_b_t * r[None, :]).to(OP), dk_b, input_precision=PRECISION)
            # The rounded operands, so that what cancels in the sum over a chunk does so exactly.
            dc = q_f.to(tl.float32) * dq_f - k_f.to(tl.float32) * dk_f
            dd = q_b_.to(tl.float32) * dq_b - k_b_.to(tl.float32) * dk_b
            dq = tl.exp2(c) * dq_f + tl.exp2(d) * dq_b
            dk = tl.exp2(-c) * dk_f + tl.exp2(-d) * dk_b
        else:
            f = tl.full((BK,), 1.0, tl.float32)
            r = tl.full((BK,), 1.0, tl.float32)
            e_f = tl.exp2(c)
            e_b = tl.exp2(d)
            h_f = tl.exp2(sum_gates(gf, C, True, True))
            h_b = tl.exp2(sum_gates(gb, C, False, True))
            k_f = (k * h_f).to(OP)
            k_b_ = (k * h_b).to(OP)
            q_b_ = (q * e_b).to(OP)
            at = tl.zeros((C, C), tl.float32)
            p = p_k + t * k_n
            at, dq_f, dk_f = exact_grads(
                at, da, q, p, p_gf + t * gf_n, k_n, gf_n, n, K, C, BK, False
            )
            at, dq_b, dk_b = exact_grads(
                at, da, q, p, p_gb + t * gb_n, k_n, gb_n, n, K, C, BK, True
            )
            dq_f += e_f * tl.dot(do, s_f_t.to(OP), input_precision=PRECISION)
            dq_b += e_b * tl.dot(do, s_b_t, input_precision=PRECISION)
            dk_f += h_f * tl.dot(v, ds_f_t, input_precision=PRECISION)
            dk_b += h_b * tl.dot(v, ds_b_t.to(OP), input_precision=PRECISION)
            dc = q * dq_f - k * dk_f
            dd = q * dq_b - k * dk_b
            dq = dq_f + dq_b
            dk = dk_f + dk_b
        store_tile(p_dq + t * H * K, dq * scale, H * K, n, K, C, BK, mask_k)
        store_tile(p_dk + t * H * K, dk * scale, H * K, n, K, C, BK, mask_k)
        dv = tl.dot(at.to(OP), do, input_precision=PRECISION)
        s = (ds_f_c.to(tl.float32) * f[:, None]).to(OP)
        dv = tl.dot(k_f, s, dv, input_precision=PRECISION)
        dv = tl.dot(k_b_, (ds_b * r[:, None]).to(OP), dv, input_precision=PRECISION)
        store_tile(p_dv + t * H * V, dv * scale, H * V, n, V - v0, C, BV, mask_v)
        new = tl.dot(tl.trans(v), k_f, input_precision=PRECISION)
        s_f_t = s_f_t * tl.exp2(c_all)[None, :] + new * f[None, :]
        b_f = tl.sum(s_f_t * ds_f_t.to(tl.float32), 0)
        dgf = sum_tokens(dc, C, True, OP) + b_f[None, :]
        store_tile(p_dgf + t * H * K, dgf * scale, H * K, n, K, C, BK, mask_k)
        dgb = sum_tokens(dd, C, False, OP) + b_b[None, :]
        store_tile(p_dgb + t * H * K, dgb * scale, H * K, n, K, C, BK, mask_k)
        new = tl.dot(tl.trans(q_b_), do, input_precision=PRECISION)
        ds_b = ds_b * tl.exp2(d_all)[:, None] + new * r[:, None]
        new = tl.dot(tl.trans(do), q_b_, input_precision=PRECISION)
        ds_b_t = ds_b_t * tl.exp2(d_all)[None, :] + new * r[None, :]
        b_b = tl.sum(s_b_t.to(tl.float32) * ds_b_t, 0)


def backward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward: gradients of q, k, v and both gates, each in its tensor's dtype."""
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    p = plan or make_plan(b, n, h, dk, dv, q.dtype, q.device)
    n_chunks = triton.cdiv(n, p.chunk)
    n_segments = triton.cdiv(n_chunks, p.chunks)
    blocks = triton.cdiv(dv, p.block_v)
    dims = dict(K=dk, V=dv, BK=p.block_k, BV=p.block_v, C=p.chunk, OP=p.op, PRECISION=p.precision)
    inputs = (q, k, v, gf, gb, do)
    states = q.new_empty(4 if n_segments > 1 else 0, b * h, n_segments, dk, dv, dtype=torch.float32)
    if n_segments > 1:
        decays = q.new_empty(2, b * h, n_segments, dk, dtype=torch.float32)
        all_segment_states_kernel[b * h, n_segments, 2 * blocks](
            *inputs, states, decays, *strides(*inputs), n, h, p.chunks * p.chunk, n_segments,
            **dims, num_warps=p.reduce_warps,
        )  # fmt: skip
        scan_states(states, decays)
    stack = q.new_empty(2, b * h, n_chunks, dk, dv, dtype=p.torch_op)
    d_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    shares = [
        torch.empty(blocks, b, n, h, dk, device=q.device, dtype=x.dtype if blocks == 1 else torch.float32)
        for x in (q, k, gf, gb)
    ]
    d_q, d_k, d_gf, d_gb = shares
    grad_kernel[b * h, n_segments, blocks](
        *inputs, d_q, d_k, d_v, d_gf, d_gb, states, stack, 0.5 * scale, *strides(*inputs),
        b, n, h, n_segments, n_chunks, p.chunks, **dims, HAS_STATES=n_segments > 1,
        num_warps=p.grad_warps,
    )  # fmt: skip
    d_q, d_k, d_gf, d_gb = (
        x[0] if blocks == 1 else x.sum(0).to(y.dtype)
        for x, y in zip(shares, (q, k, gf, gb), strict=True)
    )
    return d_q, d_k, d_v, d_gf, d_gb
