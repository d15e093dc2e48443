"""Backward of `bidirectional_gla`: the last chunk, where it has few tokens.

For `bigla_bwd_gluon.py`. Notation: `bigla_tiles.py`; formulas and scratch: `bigla_bwd_chunks.py`.
A chunk of 4 tokens, such as the last of 196, costs a program with tiles of 64 as much as a full
one; here the tiles have 16. Nothing enters the last chunk from the right, so that of the four
states two are zero, and there is no product of two states.
"""

import triton
import triton.language as tl

from mmvig.kernels.bigla_bwd_chunks import factors, sum_grads
from mmvig.kernels.bigla_tiles import load_state, load_tile, store_tile
from mmvig.kernels.launch import await_previous, kernel

TOKENS = 16  # of a last chunk that is done here, at most


@triton.jit
def entering_tile(
    p_local, p_reach, p_states, K: tl.constexpr, V: tl.constexpr, OP: tl.constexpr,
    HAS_STATES: tl.constexpr,
):  # fmt: skip
    """A state that enters the chunk, (V, K), as an operand of products."""
    s = load_state(p_local, K, V, 0, K, V)
    if HAS_STATES:
        reach = tl.load(p_reach + tl.arange(0, K))
        s = s.to(tl.float32) + load_state(p_states, K, V, 0, K, V) * tl.exp2(reach)[None, :]
    return s.to(OP)


@kernel(sizes=['N', 'H', 'n_segments', 'n_chunks'])
def tail_grads_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_dq, p_dk, p_dv, p_dgf, p_dgb,
    p_local, p_reach, p_totals, p_states, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, dk_n, dv_n, N, H, n_segments, n_chunks,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """All five gradients of the last chunk of one head, of at most R of C tokens. Program: (b, h).

    Arguments as of `chunk_grads_kernel`, whose results these are.
    """
    await_previous()
    wide = tl.zeros((), tl.int64)
    head = tl.program_id(0) + wide
    b = head // H
    h = head % H
    last = n_chunks - 1
    t = (last + wide) * C
    n = N - last * C
    gf = load_tile(p_gf + b * gf_b + h * gf_h + t * gf_n, gf_n, n, K, R, K, False)
    gb = load_tile(p_gb + b * gb_b + h * gb_h + t * gb_n, gb_n, n, K, R, K, False)
    q = load_tile(p_q + b * q_b + h * q_h + t * q_n, q_n, n, K, R, K, False)
    k = load_tile(p_k + b * k_b + h * k_h + t * k_n, k_n, n, K, R, K, False)
    v = load_tile(p_v + b * v_b + h * v_h + t * v_n, v_n, n, V, R, V, False).to(OP)
    do = load_tile(p_do + b * do_b + h * do_h + t * do_n, do_n, n, V, R, V, False).to(OP)
    p_local += (head * n_chunks + last) * 4 * K * V
    p_reach += (head * n_chunks + last) * 4 * K
    p_totals += (head * n_chunks + last) * 2 * K
    p_states += (head * n_segments + n_segments - 1) * K * V
    flow = (tl.num_programs(0) + wide) * n_segments * K * V
    cols = tl.arange(0, K)
    rows = tl.arange(0, R)
    half_f = 0.5 * tl.load(p_totals + cols)
    half_b = 0.5 * tl.load(p_totals + K + cols)
    to_middle_f = tl.exp2(half_f)[None, :]
    to_middle_b = tl.exp2(half_b)[None, :]
    s = entering_tile(p_local, p_reach, p_states, K, V, OP, HAS_STATES)
    dq_f = tl.dot(do, s, input_precision=PRECISION) * to_middle_f
    half: tl.constexpr = v.dtype == tl.bfloat16
    lower = rows[:, None] >= rows[None, :]
    higher = rows[:, None] <= rows[None, :]
    upper = higher.to(tl.float32).to(tl.bfloat16)
    c, q_f, k_f = factors(q, k, gf, upper, half_f, False)
    d, q_b_, k_b_ = factors(q, k, gb, upper, half_b, True)
    a = tl.dot(k_f.to(OP), tl.trans(q_f.to(OP)), input_precision=PRECISION)
    a_b = tl.dot(k_b_.to(OP), tl.trans(q_b_.to(OP)), input_precision=PRECISION)
    a = (tl.where(higher, a, 0.0) + tl.where(lower, a_b, 0.0)).to(OP)
    p_local += 2 * K * V
    p_reach += 2 * K
    p_states += 2 * flow
    ds = entering_tile(p_local, p_reach, p_states, K, V, OP, HAS_STATES)
    dv = tl.dot(a, do, input_precision=PRECISION)
    dv = tl.dot((k_b_ * to_middle_b).to(OP), tl.trans(ds), dv, input_precision=PRECISION)
    p_dv += (b * N + t) * dv_n + h * V
    store_tile(p_dv, dv * scale, dv_n, n, V, R, V, False)
    dk_b = tl.dot(v, ds, input_precision=PRECISION) * to_middle_b
    # Row i receives, column j gives; and the other way round.
    da = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    dat = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    da_f = tl.where(lower, da, 0.0).to(OP)
    da_b = tl.where(higher, da, 0.0).to(OP)
    dat_f = tl.where(higher, dat, 0.0).to(OP)
    dat_b = tl.where(lower, dat, 0.0).to(OP)
    dq_f = tl.dot(da_f, k_f.to(OP), dq_f, input_precision=PRECISION)
    dk_f = tl.dot(dat_f, q_f.to(OP), input_precision=PRECISION)
    dq_b = tl.dot(da_b, k_b_.to(OP), input_precision=PRECISION)
    dk_b = tl.dot(dat_b, q_b_.to(OP), dk_b, input_precision=PRECISION)
    dc = q_f * dq_f - k_f * dk_f
    dd = q_b_ * dq_b - k_b_ * dk_b
    dgf = sum_grads(upper, dc, half, PRECISION)
    dgb = dd - sum_grads(upper, dd, half, PRECISION)
    dq = dq_f * tl.exp2(c) + dq_b * tl.exp2(d)
    dk = dk_f * tl.exp2(-c) + dk_b * tl.exp2(-d)
    out = ((b * N + t) * H + h) * K
    store_tile(p_dgf + out, dgf * scale, H * K, n, K, R, K, False)
    store_tile(p_dgb + out, dgb * scale, H * K, n, K, R, K, False)
    out = (b * N + t) * dk_n + h * K
    store_tile(p_dq + out, dq * scale, dk_n, n, K, R, K, False)
    store_tile(p_dk + out, dk * scale, dk_n, n, K, R, K, False)
