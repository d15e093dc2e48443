"""Backward of `bidirectional_gla`, one chunk a program: kernel and launcher.

Notation: `bigla_tiles.py`. With the states that enter every chunk (`bigla_bwd_states.py`) no sum
crosses chunks. The gradient of g_fwd at token t of a chunk is the sum over i >= t of
dc_i = q_i dq_i - k_i dk_i, plus the column sum of S_f * dS_f at the chunk's right end. There
S_f has become e^T S_f + sum_j e^(T - c_j) v_j^T k_j, T the chunk's total, so that sum is e^T times
that of the S_f and dS_f that enter, plus the sum over j of k_j times the part of dk_j that comes
from dS_f. Likewise for g_bwd, with dS_b at the right end and the part of dq that comes from S_b.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.bigla_bwd_looped import grad_kernel
from mmvig.kernels.bigla_bwd_outputs import (
    Gradients,
    Into,
    add_shares,
    new_outputs,
    row_strides,
)
from mmvig.kernels.bigla_bwd_states import entering_pair, local_states_kernel
from mmvig.kernels.bigla_plan import make_plan
from mmvig.kernels.bigla_tiles import (
    LOG2E,
    load_tile,
    scan_states,
    store_tile,
    strides,
    sum_gates,
    sum_tokens,
)
from mmvig.kernels.grid import ceil_div, multiprocessors
from mmvig.kernels.launch import await_previous, kernel

# Chunks of a segment, and of a sequence that is left in one piece.
SEGMENT, ONE_SEGMENT = 8, 16
# Programs of `local_states_kernel` that a multiprocessor holds, limited by registers.
RESIDENT = 3


@triton.jit
def load_weights(p_upper, C: tl.constexpr):
    """(C, C) ones on and above the diagonal; from memory, since computed they fill registers."""
    i = tl.arange(0, C)
    return tl.load(p_upper + i[:, None] * C + i[None, :])


@triton.jit
def factors(q, k, g, upper, half, BACK: tl.constexpr):
    """Decays from the middle of the chunk's, in bits, and q and k with theirs, float32 (C, BK)."""
    c = sum_gates(upper, g)
    c = c - half[None, :] if BACK else g.to(tl.float32) * LOG2E + half[None, :] - c
    return c, q.to(tl.float32) * tl.exp2(c), k.to(tl.float32) * tl.exp2(-c)


@triton.jit
def sum_grads(upper, x, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of x over the tokens from each on; rounds x, as all operands of products, if `HALF`."""
    if HALF:
        return tl.dot(upper, x.to(tl.bfloat16))
    else:
        return sum_tokens(upper, x, 3 if PRECISION == 'tf32x3' else 2)


@triton.jit
def direction_grads(
    c, q, k, v, do, s, ds, sds, upper, zero, C: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One direction's share of dq and dk, and dg, without scale, float32 (C, BK).

    q and k with their decays; states and their product at the middle of the decay.
    """
    rows = tl.arange(0, C)
    if BACK:
        given = rows[:, None] >= rows[None, :]
        received = rows[:, None] <= rows[None, :]
    else:
        given = rows[:, None] <= rows[None, :]
        received = rows[:, None] >= rows[None, :]
    # Another precision, without effect in bfloat16, keeps the compiler from merging equal products,
    # whose results it would keep in registers from one direction to the other.
    half: tl.constexpr = v.dtype == tl.bfloat16
    own: tl.constexpr = 'ieee' if BACK and half else PRECISION
    ones = tl.full((C, C), 1.0, tl.float32).to(OP)
    # Row i receives, column j gives.
    da = tl.dot(do, tl.trans(v), input_precision=own)
    da = tl.where(received, da, zero).to(OP)
    dq = tl.dot(do, s, input_precision=PRECISION)
    if BACK:
        passing = (q * dq).to(OP)
    dq = tl.dot(da, k.to(OP), dq, input_precision=PRECISION)
    dc = q * dq
    dq *= tl.exp2(c + zero)
    # Row j gives, column i receives.
    da = tl.dot(v, tl.trans(do), input_precision=own)
    da = tl.where(given, da, zero).to(OP)
    dk = tl.dot(v, ds, input_precision=PRECISION)
    if not BACK:
        passing = (k * dk).to(OP)
    dk = tl.dot(da, q.to(OP), dk, input_precision=PRECISION)
    dc -= k * dk
    dk *= tl.exp2(zero - c)
    dg = sum_grads(upper, dc, half, PRECISION)
    if BACK:
        dg = dc - dg
    dg = tl.dot(tl.full((C, BV), 1.0, tl.float32).to(OP), sds, dg, input_precision=PRECISION)
    dg = tl.dot(ones, passing, dg, input_precision=PRECISION)
    if BACK:
        # Adds nothing, but holds the shared memory of v and do to the end. Where a smaller tile
        # gets it, ptxas 12.8 forms that tile's descriptor from the address it has for the larger.
        last = tl.dot(v, ds, input_precision=own)
        dg += zero * tl.dot(do, s, last, input_precision=own)
    return dq, dk, dg


@kernel(sizes=['B', 'N', 'H', 'n_segments', 'n_chunks', 'chunks'])
def chunk_grads_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_dq, p_dk, p_dv, p_dgf, p_dgb,
    p_local, p_reach, p_totals, p_states, p_upper, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, dk_n, dv_n, B, N, H, n_segments, n_chunks, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """All five gradients of one chunk of one head. Program: (b, chunk, h) x V block.

    Inputs (B, N, H, K or V); states, and what goes with them, as `local_states_kernel` and the
    scan leave them. dv (B, N, H, V); dq, dk, dgf, dgb (V blocks, B, N, H, K): each block's share. A
    token's heads follow each other, and in dgf and dgb the tokens. Products accumulate in float32.
    Chunks whose decay exceeds `MAX_CHUNK_BITS` get nonsense, which `grad_kernel`, in its exact
    form, overwrites.
    """
    await_previous()
    pid = tl.program_id(0)
    h = pid % H
    i_c = pid // H % n_chunks
    wide = tl.zeros((), tl.int64)
    b = pid // H // n_chunks + wide
    v0 = tl.program_id(1) * BV
    t = (wide + i_c) * C
    n = N - i_c * C
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    upper = load_weights(p_upper, C)
    p_q += b * q_b + h * q_h + t * q_n
    p_k += b * k_b + h * k_h + t * k_n
    p_gb += b * gb_b + h * gb_h + t * gb_n
    gf = load_tile(p_gf + b * gf_b + h * gf_h + t * gf_n, gf_n, n, K, C, BK, mask_k)
    gb = load_tile(p_gb, gb_n, n, K, C, BK, mask_k)
    q = load_tile(p_q, q_n, n, K, C, BK, mask_k)
    k = load_tile(p_k, k_n, n, K, C, BK, mask_k)
    v = load_tile(p_v + b * v_b + h * v_h + v0 + t * v_n, v_n, n, V - v0, C, BV, mask_v).to(OP)
    do = load_tile(p_do + b * do_b + h * do_h + v0 + t * do_n, do_n, n, V - v0, C, BV, mask_v)
    do = do.to(OP)
    head = b * H + h
    not_first = i_c % chunks != 0
    not_last = (i_c % chunks != chunks - 1) & (i_c != n_chunks - 1)
    p_local += (head * n_chunks + i_c) * 4 * K * V
    p_reach += (head * n_chunks + i_c) * 4 * K
    p_totals += (head * n_chunks + i_c) * 2 * K
    p_states += (head * n_segments + i_c // chunks) * K * V
    flow = (tl.num_programs(0) // n_chunks + wide) * n_segments * K * V
    cols = tl.arange(0, BK)
    half_f = 0.5 * tl.load(p_totals + cols, mask=cols < K, other=0.0)
    half_b = 0.5 * tl.load(p_totals + K + cols, mask=cols < K, other=0.0)
    s_f, ds_f, sds_f = entering_pair(
        p_local, p_local + 3 * K * V, p_reach, p_reach + 3 * K, p_states, p_states + 3 * flow,
        half_f, not_first, not_last, K, V, v0, BK, BV, OP, HAS_STATES,
    )  # fmt: skip
    s_b, ds_b, sds_b = entering_pair(
        p_local + K * V, p_local + 2 * K * V, p_reach + K, p_reach + 2 * K, p_states + flow,
        p_states + 2 * flow, half_b, not_last, not_first, K, V, v0, BK, BV, OP, HAS_STATES,
    )  # fmt: skip
    # A zero unknown to the compiler, which otherwise rounds masked tiles element by element.
    zero = tl.minimum(N, 0).to(tl.float32)
    rows = tl.arange(0, C)
    token = ((wide + tl.program_id(1)) * B + b) * N + t
    out = (token * H + h) * K
    c, q_, k_ = factors(q, k, gf, upper, half_f, False)
    dq, dk, dg = direction_grads(
        c, q_, k_, v, do, s_f, ds_f, sds_f, upper, zero, C, BV, OP, PRECISION, False
    )
    store_tile(p_dgf + out, dg * scale, H * K, n, K, C, BK, mask_k)
    a = tl.dot(k_.to(OP), tl.trans(q_.to(OP)), input_precision=PRECISION)
    a = tl.where(rows[:, None] <= rows[None, :], a, zero).to(OP)
    dv = tl.dot(a, do, input_precision=PRECISION)
    dv = tl.dot(k_.to(OP), tl.trans(ds_f), dv, input_precision=PRECISION)
    # Loaded again, from addresses that the compiler does not know to be the same.
    again = tl.minimum(N, 0) * 64
    q = load_tile(p_q + again, q_n, n, K, C, BK, mask_k)
    k = load_tile(p_k + again, k_n, n, K, C, BK, mask_k)
    c, q_, k_ = factors(q, k, gb, upper, half_b, True)
    a = tl.dot(k_.to(OP), tl.trans(q_.to(OP)), input_precision=PRECISION)
    a = tl.where(rows[:, None] >= rows[None, :], a, zero).to(OP)
    dv = tl.dot(a, do, dv, input_precision=PRECISION)
    dv = tl.dot(k_.to(OP), tl.trans(ds_b), dv, input_precision=PRECISION)
    p_dv += (b * N + t) * dv_n + h * V + v0
    store_tile(p_dv, dv * scale, dv_n, n, V - v0, C, BV, mask_v)
    dq_b, dk_b, dg = direction_grads(
        c, q_, k_, v, do, s_b, ds_b, sds_b, upper, -zero, C, BV, OP, PRECISION, True
    )
    store_tile(p_dgb + out, dg * scale, H * K, n, K, C, BK, mask_k)
    out = token * dk_n + h * K
    store_tile(p_dq + out, (dq + dq_b) * scale, dk_n, n, K, C, BK, mask_k)
    store_tile(p_dk + out, (dk + dk_b) * scale, dk_n, n, K, C, BK, mask_k)


def segment_length(n_chunks: int, heads: int, processors: int) -> int:
    """Chunks of a segment, which four programs walk, one a flow.

    As many as save scratch and the scan's time, as long as the programs fill the device.
    """
    if n_chunks <= ONE_SEGMENT and 4 * heads >= processors:
        return n_chunks
    filling = 4 * heads * n_chunks // (RESIDENT * processors)
    return min(SEGMENT, max(1, filling))


def half_bits(totals: Tensor, chunks: int) -> Tensor:
    """Half the strongest decay of a chunk in each segment, (B*H, segment), from all totals.

    `grad_kernel` decides by it whether a segment takes the exact form.
    """
    strongest = totals.flatten(2).amin(-1)
    if chunks >= strongest.shape[1]:
        return 0.5 * strongest.amin(-1, keepdim=True)
    return -F.max_pool1d(-0.5 * strongest, chunks, ceil_mode=True)


def backward_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    chunk: int | None = None, chunks: int | None = None, into: Into | None = None,
) -> Gradients:  # fmt: skip
    """Launches the backward: gradients of q, k, v and both gates, each in its tensor's dtype.

    Args:
        q, k, v, gf, gb, do: As in `bidirectional_gla`, and the output's gradient, (B, N, H, V);
            last dims contiguous.
        scale: Factor of q.
        chunk, chunks: Tokens of a chunk and chunks of a segment, where not those of the plan.
        into: As of `bigla_bwd.backward`.
    """
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    p = make_plan(q, v, grads=True)
    chunk = chunk or p.chunk
    n_chunks = ceil_div(n, chunk)
    chunks = chunks or segment_length(n_chunks, b * h, multiprocessors(q.device))
    n_segments = ceil_div(n_chunks, chunks)
    blocks = ceil_div(dv, p.block_v)
    dims = dict(K=dk, V=dv, BK=p.block_k, BV=p.block_v, C=chunk, OP=p.op, PRECISION=p.precision)
    inputs = (q, k, v, gf, gb, do)
    several = n_segments > 1
    local = q.new_empty(b * h, n_chunks, 4, dv, dk, dtype=p.torch_op)
    upper = q.new_empty(chunk, chunk, dtype=torch.bfloat16)
    sizes = ((b * h, n_chunks, 4, dk), (b * h, n_chunks, 2, dk), (2, b * h, n_segments, dk))
    reach, totals, decays = (q.new_empty(size, dtype=torch.float32) for size in sizes)
    states = q.new_empty(4 if several else 0, b * h, n_segments, dv, dk, dtype=torch.float32)
    local_states_kernel[4 * b * h * n_segments, blocks](
        *inputs, local, reach, totals, states, decays, upper, *strides(*inputs),
        n, h, n_chunks, n_segments, chunks, **dims, num_warps=4, num_stages=3,
    )  # fmt: skip
    if several:
        scan_states(states, decays)
    outputs = new_outputs(inputs, blocks, into)
    rows = row_strides(outputs)
    chunk_grads_kernel[b * h * n_chunks, blocks](
        *inputs, *outputs, local, reach, totals, states, upper, 0.5 * scale, *strides(*inputs),
        *rows, b, n, h, n_segments, n_chunks, chunks, **dims, HAS_STATES=several,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    grad_kernel[b * h, n_segments, blocks](
        *inputs, *outputs, states, half_bits(totals, chunks), local, 0.5 * scale,
        *strides(*inputs), *rows, b, n, h, n_segments, n_chunks, chunks, **dims,
        HAS_STATES=several, EXACT=True, **p.exact,
    )  # fmt: skip
    return add_shares(outputs, inputs, blocks, into)
