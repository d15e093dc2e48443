"""Backward of `bidirectional_gla`, one segment a program: kernels and launcher.

Takes what `bigla_bwd_chunks.py` does not, and gates of any size. Notation: `bigla_tiles.py`.

The gradient of a gate needs no extra products: with dc_i = q_i dq_i - k_i dk_i (per key channel,
of one direction), the gradient of g_fwd at t is the sum of dc_i over i >= t. Beyond the end of a
chunk that sum is the row sum of S_f * dS_f there, both of which are at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.bigla_bwd_outputs import (
    Gradients,
    Into,
    add_shares,
    new_outputs,
    row_strides,
)
from mmvig.kernels.bigla_plan import make_plan
from mmvig.kernels.bigla_tiles import (
    INTERPRETED,
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
    sum_tokens,
)
from mmvig.kernels.grid import ceil_div
from mmvig.kernels.launch import await_previous, kernel


@kernel(sizes=['N', 'H', 'segment', 'n_segments'])
def all_segment_states_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_states, p_decays, p_weakest,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, N, H, segment, n_segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to all four states. Program: (head, segment, V block x 2 pairs)."""
    await_previous()
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
        right, left, right_total, left_total, weakest = reduce_segment(
            p_k + b * k_b + t * k_n + h * k_h, p_v + b * v_b + t * v_n + h * v_h, p_gf, p_gb,
            k_n, v_n, gf_n, gb_n, n, K, V, v0, C, BK, BV, BK != K, V % BV != 0, OP, PRECISION,
            False,
        )  # fmt: skip
        store_states(
            p_states, p_decays, p_weakest, right, left, right_total, left_total, weakest, flow,
            slot, 0, v0, K, V, BK, BV, True,
        )  # fmt: skip
    else:
        right, left, right_total, left_total, weakest = reduce_segment(
            p_q + b * q_b + t * q_n + h * q_h, p_do + b * do_b + t * do_n + h * do_h, p_gb, p_gf,
            q_n, do_n, gb_n, gf_n, n, K, V, v0, C, BK, BV, BK != K, V % BV != 0, OP, PRECISION,
            True,
        )  # fmt: skip
        store_states(
            p_states, p_decays, p_weakest, right, left, right_total, left_total, weakest, flow,
            slot, 2, v0, K, V, BK, BV, False,
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
def exact_chunk(
    q, k, v, do, gf, gb, s_f, s_b, ds_f, ds_b, p_k, p_gf, p_gb, p_dq, p_dk, p_dv,
    k_n, gf_n, gb_n, dk_n, dv_n, n, v0, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dq, dk and dv of a chunk whose gates are too strong for the factored form.

    States are those that enter the chunk, pointers those of the chunk. Returns dc and dd, float32
    (C, BK), and S_f and dS_b as they leave the chunk.
    """
    to_f = tl.exp2(scan_gates(gf, False, False))
    to_b = tl.exp2(scan_gates(gb, True, False))
    from_f = tl.exp2(scan_gates(gf, True, True))
    from_b = tl.exp2(scan_gates(gb, False, True))
    a = tl.zeros((C, C), tl.float32)
    da = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    a, dq_f, dk_f = exact_grads(a, da, q, p_k, p_gf, k_n, gf_n, n, K, C, BK, False)
    a, dq_b, dk_b = exact_grads(a, da, q, p_k, p_gb, k_n, gb_n, n, K, C, BK, True)
    dq_f += to_f * tl.dot(do, s_f.to(OP), input_precision=PRECISION)
    dq_b += to_b * tl.dot(do, s_b.to(OP), input_precision=PRECISION)
    dk_f += from_f * tl.dot(v, ds_f.to(OP), input_precision=PRECISION)
    dk_b += from_b * tl.dot(v, ds_b.to(OP), input_precision=PRECISION)
    store_tile(p_dq, (dq_f + dq_b) * scale, dk_n, n, K, C, BK, BK != K)
    store_tile(p_dk, (dk_f + dk_b) * scale, dk_n, n, K, C, BK, BK != K)
    k_f = (k * from_f).to(OP)
    dv = tl.dot(a.to(OP), do, input_precision=PRECISION)
    dv = tl.dot(k_f, tl.trans(ds_f.to(OP)), dv, input_precision=PRECISION)
    dv = tl.dot((k * from_b).to(OP), tl.trans(ds_b.to(OP)), dv, input_precision=PRECISION)
    store_tile(p_dv, dv * scale, dv_n, n, V - v0, C, BV, V % BV != 0)
    s_f *= tl.exp2(2.0 * half_gates(gf, C, BV))
    s_f = tl.dot(tl.trans(v), k_f, s_f, input_precision=PRECISION)
    ds_b *= tl.exp2(2.0 * half_gates(gb, C, BV))
    ds_b = tl.dot(tl.trans(do), (q * to_b).to(OP), ds_b, input_precision=PRECISION)
    return q * dq_f - k * dk_f, q * dq_b - k * dk_b, s_f, ds_b


@triton.jit
def sum_again(weights, g, zero):
    """`sum_gates`, not merged by the compiler with an equal sum: cheaper than spilling that one.

    zero is a scalar whose value the compiler does not know.
    """
    if g.dtype == tl.float32 or INTERPRETED:
        return sum_gates(weights, g) + zero
    else:
        return tl.dot(weights.to(g.dtype), g, tl.zeros(g.shape, tl.float32) + zero) * LOG2E


@kernel(sizes=['B', 'N', 'H', 'n_segments', 'n_chunks', 'chunks'])
def grad_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_dq, p_dk, p_dv, p_dgf, p_dgb,
    p_states, p_weakest, p_stack, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, dk_n, dv_n, B, N, H, n_segments, n_chunks, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All five gradients of one segment of one head, from one block of value channels.

    Inputs as in `output_kernel`; states (4, B*H, segment, V, K) float32, those that enter each
    segment, flows as in `scan_states_kernel`; stack (2, B*H, chunk, V, K), scratch of dtype OP for
    S_b and dS_f. dv (B, N, H, V); dq, dk, dgf, dgb (V blocks, B, N, H, K): each block's share. A
    token's heads follow each other, and in dgf and dgb the tokens.
    Walks the chunks right to left, stacking the states that flow left, then left to right with
    those that flow right in registers. Products accumulate in float32. Launched twice, as
    `output_kernel` is.

    The gradient of the scores is formed in the two orientations that the products need, not by
    transposing a product: as a left operand that is miscompiled on Hopper by Triton 3.4 to 3.7.0.
    """
    await_previous()
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
    p_dv += b * N * dv_n + h * V + v0
    token = ((wide + tl.program_id(2)) * B + b) * N
    p_dq += token * dk_n + h * K
    p_dk += token * dk_n + h * K
    p_dgf += (token * H + h) * K
    p_dgb += (token * H + h) * K
    stack = (wide + tl.num_programs(0)) * n_chunks * K * V
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    rows = tl.arange(0, C)

    slot = (wide + head) * n_segments + i_s
    if HAS_STATES or EXACT:
        factors = tl.load(p_weakest + slot) > -0.5 * MAX_CHUNK_BITS
        if factors == EXACT:
            return
    weakest = tl.zeros((BV, BK), tl.float32)
    if HAS_STATES:
        flow = (wide + tl.num_programs(0)) * n_segments * K * V
        p_states += slot * K * V
        s_f = load_state(p_states, K, V, v0, BK, BV)
        s_b = load_state(p_states + flow, K, V, v0, BK, BV)
        ds_b = load_state(p_states + 2 * flow, K, V, v0, BK, BV)
        ds_f = load_state(p_states + 3 * flow, K, V, v0, BK, BV)
    else:
        s_f = tl.zeros((BV, BK), tl.float32)
        s_b = tl.zeros((BV, BK), tl.float32)
        ds_b = tl.zeros((BV, BK), tl.float32)
        ds_f = tl.zeros((BV, BK), tl.float32)

    p_stack += ((wide + head) * n_chunks + first) * K * V
    store_state(p_stack + (wide + last - first) * K * V, s_b, K, V, v0, BK, BV)
    store_state(p_stack + stack + (wide + last - first) * K * V, ds_f, K, V, v0, BK, BV)
    strictly_before = before(C, True)
    not_after = before(C, False)
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
        q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
        do = load_tile(p_do + t * do_n, do_n, n, V - v0, C, BV, mask_v).to(OP)
        gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
        q = (q * tl.exp2(sum_gates(not_after, gf))).to(OP)
        half_f = half_gates(gf, C, BV)
        ds_f = tl.dot(tl.trans(do), q, ds_f * tl.exp2(2.0 * half_f), input_precision=PRECISION)
        p_left = p_stack + (wide + i_c - 1 - first) * K * V
        store_state(p_left, s_b, K, V, v0, BK, BV)
        store_state(p_left + stack, ds_f, K, V, v0, BK, BV)
        if not (HAS_STATES or EXACT):
            weakest = tl.minimum(weakest, tl.minimum(half_f, half_b))
    # Other threads of this program read what was stacked.
    tl.debug_barrier()

    # Sums up to a token less half of all: decays measured from the middle of the chunk's decay.
    from_middle_f = before(C, False, 0.5)
    from_middle_b = after(C, False, 0.5)
    half = tl.full((C, C), 0.5, tl.float32).to(tl.bfloat16)
    ones = tl.full((C, BV), 1.0, tl.float32).to(OP)
    parts: tl.constexpr = 3 if PRECISION == 'tf32x3' else 2
    if EXACT:
        for i_c in range(first, last + 1):
            t = (wide + i_c) * C
            n = N - i_c * C
            q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
            k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
            v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
            do = load_tile(p_do + t * do_n, do_n, n, V - v0, C, BV, mask_v).to(OP)
            gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
            gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
            p_here = p_stack + (wide + i_c - first) * K * V
            s_b = load_state(p_here, K, V, v0, BK, BV).to(tl.float32)
            ds_f = load_state(p_here + stack, K, V, v0, BK, BV).to(tl.float32)
            dc, dd, s_f, ds_b = exact_chunk(
                q, k, v, do, gf, gb, s_f, s_b, ds_f, ds_b,
                p_k + t * k_n, p_gf + t * gf_n, p_gb + t * gb_n, p_dq + t * dk_n,
                p_dk + t * dk_n, p_dv + t * dv_n, k_n, gf_n, gb_n, dk_n, dv_n, n, v0, scale,
                K, V, C, BK, BV, OP, PRECISION,
            )  # fmt: skip
            # Sums over i >= t of dc, over i > t of -dd, and the gradients at the chunk's right end.
            d_g = sum_tokens(from_middle_b, dc, parts) + sum_tokens(half, dc, parts)
            d_g += tl.dot(ones, (s_f * ds_f).to(OP), input_precision=PRECISION)
            store_tile(p_dgf + t * H * K, d_g * scale, H * K, n, K, C, BK, mask_k)
            d_g = sum_tokens(from_middle_f, dd, parts) - sum_tokens(half, dd, parts)
            d_g += tl.dot(ones, (s_b * ds_b).to(OP), input_precision=PRECISION)
            store_tile(p_dgb + t * H * K, d_g * scale, H * K, n, K, C, BK, mask_k)
        return
    if not HAS_STATES:
        t = (wide + first) * C
        n = N - first * C
        gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        weakest = tl.minimum(weakest, tl.minimum(half_gates(gf, C, BV), half_gates(gb, C, BV)))
        half_bits = tl.min(weakest)
        tl.store(p_weakest + slot, half_bits)
        if half_bits <= -0.5 * MAX_CHUNK_BITS:
            return
    # A zero unknown to the compiler, which otherwise rounds masked tiles element by element.
    zero = tl.minimum(N, 0).to(tl.float32)
    # Loaded a chunk ahead, not by the pipeliner: its buffers would take the room of a program.
    s_b_in = load_state(p_stack, K, V, v0, BK, BV)
    ds_f_in = load_state(p_stack + stack, K, V, v0, BK, BV)
    for i_c in range(first, last + 1):
        t = (wide + i_c) * C
        n = N - i_c * C
        q = load_tile(p_q + t * q_n, q_n, n, K, C, BK, mask_k).to(tl.float32)
        k = load_tile(p_k + t * k_n, k_n, n, K, C, BK, mask_k).to(tl.float32)
        v = load_tile(p_v + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
        do = load_tile(p_do + t * do_n, do_n, n, V - v0, C, BV, mask_v).to(OP)
        gf = load_tile(p_gf + t * gf_n, gf_n, n, K, C, BK, mask_k)
        gb = load_tile(p_gb + t * gb_n, gb_n, n, K, C, BK, mask_k)
        # States first: what they need is then out of the registers.
        e_f = tl.exp2(half_gates(gf, C, BV))
        s_f *= e_f
        s_f_op = s_f.to(OP)
        ds_f_op = (ds_f_in.to(tl.float32) * e_f).to(OP)
        c = sum_gates(from_middle_f, gf)
        q_f = (q * tl.exp2(c)).to(OP)
        k_f = (k * tl.exp2(-c)).to(OP)
        s_f = tl.dot(tl.trans(v), k_f, s_f, input_precision=PRECISION)
        s_f *= e_f
        e_b = tl.exp2(half_gates(gb, C, BV))
        ds_b *= e_b
        ds_b_op = ds_b.to(OP)
        s_b_op = (s_b_in.to(tl.float32) * e_b).to(OP)
        d = sum_gates(from_middle_b, gb)
        q_b_ = (q * tl.exp2(d)).to(OP)
        k_b_ = (k * tl.exp2(-d)).to(OP)
        ds_b = tl.dot(tl.trans(do), q_b_, ds_b, input_precision=PRECISION)
        ds_b *= e_b
        # Row j gives, column i receives.
        a = tl.dot(k_f, tl.trans(q_f), input_precision=PRECISION)
        a = tl.where(rows[:, None] <= rows[None, :], a, 0.0)
        a_b = tl.dot(k_b_, tl.trans(q_b_), input_precision=PRECISION)
        a += tl.where(rows[:, None] >= rows[None, :], a_b, 0.0)
        dv = tl.dot(a.to(OP), do, input_precision=PRECISION)
        dv = tl.dot(k_f, tl.trans(ds_f_op), dv, input_precision=PRECISION)
        dv = tl.dot(k_b_, tl.trans(ds_b_op), dv, input_precision=PRECISION)
        store_tile(p_dv + t * dv_n, dv * scale, dv_n, n, V - v0, C, BV, mask_v)
        # Row i receives, column j gives.
        da = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        da_f = tl.where(rows[:, None] >= rows[None, :], da, zero).to(OP)
        dq_f = tl.dot(do, s_f_op, input_precision=PRECISION)
        dq_f = tl.dot(da_f, k_f, dq_f, input_precision=PRECISION)
        dq_f *= tl.exp2(sum_again(from_middle_f, gf, zero))
        dc = q * dq_f
        da_b = tl.where(rows[:, None] <= rows[None, :], da, zero).to(OP)
        dq_b = tl.dot(do, s_b_op, input_precision=PRECISION)
        dq_b = tl.dot(da_b, k_b_, dq_b, input_precision=PRECISION)
        dq_b *= tl.exp2(sum_again(from_middle_b, gb, zero))
        dd = q * dq_b
        store_tile(p_dq + t * dk_n, (dq_f + dq_b) * scale, dk_n, n, K, C, BK, mask_k)
        # Row j gives, column i receives.
        da = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        da_f = tl.where(rows[:, None] <= rows[None, :], da, zero).to(OP)
        dk_f = tl.dot(v, ds_f_op, input_precision=PRECISION)
        dk_f = tl.dot(da_f, q_f, dk_f, input_precision=PRECISION)
        dk_f *= tl.exp2(-sum_again(from_middle_f, gf, -zero))
        dc -= k * dk_f
        da_b = tl.where(rows[:, None] >= rows[None, :], da, zero).to(OP)
        dk_b = tl.dot(v, ds_b_op, input_precision=PRECISION)
        dk_b = tl.dot(da_b, q_b_, dk_b, input_precision=PRECISION)
        dk_b *= tl.exp2(-sum_again(from_middle_b, gb, -zero))
        dd -= k * dk_b
        store_tile(p_dk + t * dk_n, (dk_f + dk_b) * scale, dk_n, n, K, C, BK, mask_k)
        end_f = (s_f * ds_f_in.to(tl.float32)).to(OP)
        end_b = (ds_b * s_b_in.to(tl.float32)).to(OP)
        p_next = p_stack + (wide + i_c + 1 - first) * K * V
        s_b_in = load_state(p_next, K, V, v0, BK, BV, i_c < last)
        ds_f_in = load_state(p_next + stack, K, V, v0, BK, BV, i_c < last)
        # Sums over i >= t of dc, over i > t of -dd, and the gradients at the chunk's right end.
        d_g = sum_tokens(from_middle_b, dc, parts) + sum_tokens(half, dc, parts)
        d_g = tl.dot(ones, end_f, d_g, input_precision=PRECISION) * scale
        store_tile(p_dgf + t * H * K, d_g, H * K, n, K, C, BK, mask_k)
        d_g = sum_tokens(from_middle_f, dd, parts) - sum_tokens(half, dd, parts)
        d_g = tl.dot(ones, end_b, d_g, input_precision=PRECISION) * scale
        store_tile(p_dgb + t * H * K, d_g, H * K, n, K, C, BK, mask_k)


def backward_looped(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    chunk: int | None = None, chunks: int | None = None, into: Into | None = None,
) -> Gradients:  # fmt: skip
    """Launches the backward; arguments and results as of `bigla_bwd.backward`."""
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    p = make_plan(q, v, chunk, chunks, grads=True)
    n_chunks = ceil_div(n, p.chunk)
    n_segments = ceil_div(n_chunks, p.chunks)
    blocks = ceil_div(dv, p.block_v)
    dims = dict(K=dk, V=dv, BK=p.block_k, BV=p.block_v, C=p.chunk, OP=p.op, PRECISION=p.precision)
    inputs = (q, k, v, gf, gb, do)
    states = q.new_empty(4 if n_segments > 1 else 0, b * h, n_segments, dv, dk, dtype=torch.float32)
    weakest = states.new_empty(b * h, n_segments)
    if n_segments > 1:
        decays = q.new_empty(2, b * h, n_segments, dk, dtype=torch.float32)
        all_segment_states_kernel[b * h, n_segments, 2 * blocks](
            *inputs, states, decays, weakest, *strides(*inputs), n, h, p.chunks * p.chunk,
            n_segments, **dims, **p.reduce,
        )  # fmt: skip
        scan_states(states, decays)
    stack = q.new_empty(2, b * h, n_chunks, dv, dk, dtype=p.torch_op)
    outputs = new_outputs(inputs, blocks, into)
    for exact in (False, True):
        grad_kernel[b * h, n_segments, blocks](
            *inputs, *outputs, states, weakest, stack, 0.5 * scale, *strides(*inputs),
            *row_strides(outputs), b, n, h, n_segments, n_chunks, p.chunks, **dims,
            HAS_STATES=n_segments > 1, EXACT=exact, **(p.exact if exact else p.grad),
        )  # fmt: skip
    return add_shares(outputs, inputs, blocks, into)
