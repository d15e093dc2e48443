"""Backward of `bidirectional_gla` by chunks in Gluon, for Hopper: gradients' kernel and launcher.

Formulas and notation: `bigla_bwd_chunks.py`, whose results these are; the states that enter every
chunk come from `bigla_bwd_gluon_states.py`. Gluon is Triton's language with layouts, copies, shared
memory and waits placed by hand, of which Triton's compiler makes less here: it waits for every
product before the next, puts a barrier around each use of shared memory, and keeps in registers
what is quicker to load or compute again, up to all 255, for two programs a multiprocessor. Here all
tiles are copied to 72 KB of shared memory at once, products that do not depend on each other are in
flight together, and 168 registers let a multiprocessor hold three programs. Key dim 32, value dim
64, chunks of 64 tokens, bfloat16. Only `bigla_bwd.py` imports this, where Triton has this Gluon.
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mmvig.kernels.bigla_bwd_chunks import ONE_SEGMENT, SEGMENT
from mmvig.kernels.bigla_bwd_gluon_states import states_kernel
from mmvig.kernels.bigla_bwd_looped import grad_kernel
from mmvig.kernels.bigla_bwd_outputs import Gradients, Into, new_outputs, row_strides
from mmvig.kernels.bigla_bwd_tail import TOKENS as TAIL
from mmvig.kernels.bigla_bwd_tail import tail_grads_kernel
from mmvig.kernels.bigla_gluon_tiles import (
    CHUNK,
    KEYS,
    LAUNCH,
    LEFT_KEYS,
    LEFT_TOKENS,
    LOG2E,
    NARROW,
    OVERHEAD,
    RESIDENT,
    ROWS_K,
    TOKENS,
    WIDE,
    C,
    K,
    V,
    await_previous,
    copy_rows,
    decayed,
    held,
    held_pairs,
    write_rows,
)
from mmvig.kernels.bigla_plan import duration, make_plan
from mmvig.kernels.bigla_tiles import scan_states, strides, triangles
from mmvig.kernels.grid import ceil_div, multiprocessors
from mmvig.kernels.launch import kernel

TAIL_LAUNCH = dict(num_warps=1)
STAGES = 3  # chunks in shared memory in the states: that in work and the next two


@gluon.jit
def add_segment(s, p_reach, p_states, half):
    """s (V, K), float32, plus the state that enters the segment, decayed up to here."""
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS_K))[:, None]
    cols = gl.arange(0, 32, layout=gl.SliceLayout(0, ROWS_K))
    e = gl.exp2(gl.load(p_reach + cols) + half)
    return s + gl.load(p_states + (rows * 32 + cols[None, :])) * e[None, :]


@gluon.jit
def prepare_states(
    s_s, s_ds, s_sds, p_total, p_s_reach, p_ds_reach, p_s_in, p_ds_in, HAS_STATES: gl.constexpr,
):  # fmt: skip
    """Brings one direction's S and dS (V, K), in place, to the middle of the chunk's decay.

    And writes their product to s_sds.
    """
    cols = gl.arange(0, 32, layout=gl.SliceLayout(0, ROWS_K))
    half = 0.5 * gl.load(p_total + cols)
    e = gl.exp2(half)[None, :]
    s = s_s.load(ROWS_K).to(gl.float32) * e
    ds = s_ds.load(ROWS_K).to(gl.float32) * e
    if HAS_STATES:
        s = add_segment(s, p_s_reach, p_s_in, half)
        ds = add_segment(ds, p_ds_reach, p_ds_in, half)
    s_s.store(s.to(gl.bfloat16))
    s_ds.store(ds.to(gl.bfloat16))
    s_sds.store((s * ds).to(gl.bfloat16))


@gluon.jit
def one_direction(
    s_upper, s_g, s_q, s_k, s_v, s_do, s_s, s_ds, s_sds, s_qe, s_ke, p_total, zero, again,
    BACK: gl.constexpr,
):  # fmt: skip
    """One direction's dq and dk, and dg in flight: float32 (C, K), without scale.

    Leaves q and k with their decays in s_qe and s_ke; overwrites the gates and S. zero and again
    are zeros that the compiler does not know: it would else keep masks and decays in registers.
    """
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, TOKENS))[:, None] + again
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, TOKENS))[None, :]
    none = gl.zeros([64, 32], gl.float32, layout=KEYS)
    nothing = gl.zeros([64, 64], gl.float32, layout=TOKENS)
    c = warpgroup_mma(s_upper, s_g, none, use_acc=False, is_async=True)
    half = 0.5 * gl.load(p_total + gl.arange(0, 32, layout=gl.SliceLayout(0, KEYS)))[None, :]
    c = warpgroup_mma_wait(0, deps=[c])
    c = c * LOG2E - half if BACK else s_g.load(KEYS).to(gl.float32) * LOG2E + half - c * LOG2E
    s_qe.store(decayed(s_q.load(KEYS), c))
    s_ke.store(decayed(s_k.load(KEYS), -c))
    fence_async_shared()
    # First comes the result that has no part in what passes the chunk, which replaces a state.
    if BACK:
        s_x, s_y, s_in, s_other, s_near, s_far = s_v, s_do, s_s, s_ds, s_ke, s_qe
    else:
        s_x, s_y, s_in, s_other, s_near, s_far = s_do, s_v, s_ds, s_s, s_qe, s_ke
    da = warpgroup_mma(s_x, s_y.permute((1, 0)), nothing, use_acc=False, is_async=True)
    da = warpgroup_mma_wait(0, deps=[da])
    da = gl.where(rows >= cols, da, zero)
    da = gl.convert_layout(held_pairs(da.to(gl.bfloat16)), LEFT_KEYS)
    first = warpgroup_mma(s_x, s_other, none, use_acc=False, is_async=True)
    first = warpgroup_mma(da, s_far, first, is_async=True)
    dat = warpgroup_mma(s_y, s_x.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dat = warpgroup_mma_wait(0, deps=[dat])
    dat = gl.where(rows <= cols, dat, zero)
    dat = gl.convert_layout(held_pairs(dat.to(gl.bfloat16)), LEFT_KEYS)
    second = warpgroup_mma(s_y, s_in, none, use_acc=False, is_async=True)
    second = warpgroup_mma_wait(0, deps=[second])
    s_s.store((s_far.load(KEYS).to(gl.float32) * second).to(gl.bfloat16))
    second = warpgroup_mma(dat, s_near, second, is_async=True)
    first, second = warpgroup_mma_wait(0, deps=[first, second])
    if BACK:
        dq, dk = second, first
    else:
        dq, dk = first, second
    dq = held(dq * gl.exp2(c + zero))
    dk = held(dk * gl.exp2(zero - c))
    dc = s_q.load(KEYS).to(gl.float32) * dq - s_k.load(KEYS).to(gl.float32) * dk
    # Of tokens on the other side, with the sign that they have there; the gates' memory is free.
    s_g.store((-dc if BACK else dc).to(gl.bfloat16))
    fence_async_shared()
    one = gl.full([64, 64], 1.0, gl.bfloat16, layout=LEFT_KEYS)
    dg = warpgroup_mma(s_upper, s_g, dc, use_acc=BACK, is_async=True)
    dg = warpgroup_mma(one, s_s, dg, is_async=True)
    dg = warpgroup_mma(one, s_sds, dg, is_async=True)
    return dq, dk, dg


@kernel(sizes=['B', 'N', 'H', 'n_segments', 'n_chunks', 'chunks', 'n_done'], jit=gluon.jit)
def grads_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_dq, p_dk, p_dv, p_dgf, p_dgb,
    p_local, p_reach, p_totals, p_states, p_weakest, p_upper, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, dk_n, dv_n, B, N, H, n_segments, n_chunks, chunks, n_done,
    HAS_STATES: gl.constexpr,
):  # fmt: skip
    """All five gradients of one chunk of one head. Program: (b, chunk, h); 4 warps.

    Of the first n_done of n_chunks chunks. Inputs (B, N, H, K or V), bfloat16; states, and what
    goes with them, as `states_kernel` and the scan leave them. dv (B, N, H, V), dq, dk, dgf, dgb
    (B, N, H, K), bfloat16; a token's heads follow each other, and in dgf and dgb the tokens.
    Products accumulate in float32. Chunks whose decay exceeds `MAX_CHUNK_BITS` get nonsense, which
    `grad_kernel`, in its exact form, overwrites; it reads the last third of weakest (3, B*H,
    segment), which is written here: of both directions, whose own the first two are.
    """
    await_previous()
    pid = gl.program_id(0)
    h = pid % H
    i_c = pid // H % n_done
    b = (pid // H // n_done).to(gl.int64)
    t = i_c.to(gl.int64) * C
    n = N - i_c * C
    head = b * H + h
    not_first = i_c % chunks != 0
    not_last = (i_c % chunks != chunks - 1) & (i_c != n_chunks - 1)

    s_gf = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)
    s_gb = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)
    s_q = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)
    s_k = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)
    s_v = gl.allocate_shared_memory(gl.bfloat16, [C, V], WIDE)
    s_do = gl.allocate_shared_memory(gl.bfloat16, [C, V], WIDE)
    s_upper = gl.allocate_shared_memory(gl.bfloat16, [C, C], WIDE)
    s_sf = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    s_sb = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    s_dsb = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    s_dsf = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    s_sds = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    s_qf = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)
    s_kf = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)
    s_kb = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)

    copy_rows(s_v, p_v + (b * v_b + h * v_h + t * v_n), v_n, n, V)
    copy_rows(s_do, p_do + (b * do_b + h * do_h + t * do_n), do_n, n, V)
    p_local += (head * n_chunks + i_c) * 4 * K * V
    every = gl.where(not_first, 64, 0)
    copy_rows(s_sf, p_local, K, every, K)
    copy_rows(s_dsb, p_local + 2 * K * V, K, every, K)
    every = gl.where(not_last, 64, 0)
    copy_rows(s_sb, p_local + K * V, K, every, K)
    copy_rows(s_dsf, p_local + 3 * K * V, K, every, K)
    copy_rows(s_upper, p_upper, C, C, C)
    copy_rows(s_gf, p_gf + (b * gf_b + h * gf_h + t * gf_n), gf_n, n, K)
    copy_rows(s_q, p_q + (b * q_b + h * q_h + t * q_n), q_n, n, K)
    copy_rows(s_k, p_k + (b * k_b + h * k_h + t * k_n), k_n, n, K)
    copy_rows(s_gb, p_gb + (b * gb_b + h * gb_h + t * gb_n), gb_n, n, K)
    async_copy.commit_group()

    p_reach += (head * n_chunks + i_c) * 4 * K
    p_totals += (head * n_chunks + i_c) * 2 * K
    slot = head * n_segments + i_c // chunks
    slots = (gl.num_programs(0) // n_done).to(gl.int64) * n_segments
    p_states += slot * K * V
    flow = slots * K * V
    if not not_first:
        bits = gl.minimum(gl.load(p_weakest + slot), gl.load(p_weakest + slots + slot))
        gl.store(p_weakest + 2 * slots + slot, bits)
    out = ((b * N + t) * H + h) * K
    async_copy.wait_group(0)
    fence_async_shared()

    prepare_states(
        s_sf, s_dsf, s_sds, p_totals, p_reach, p_reach + 3 * K, p_states, p_states + 3 * flow,
        HAS_STATES,
    )  # fmt: skip
    fence_async_shared()
    zero = gl.minimum(N, 0).to(gl.float32)
    dq_f, dk_f, dg = one_direction(
        s_upper, s_gf, s_q, s_k, s_v, s_do, s_sf, s_dsf, s_sds, s_qf, s_kf,
        p_totals, zero, gl.minimum(N, 0), False,
    )  # fmt: skip
    dg = warpgroup_mma_wait(0, deps=[dg])
    write_rows((dg * scale).to(gl.bfloat16), s_gf, p_dgf + out, H * K, n, K)
    prepare_states(
        s_sb, s_dsb, s_sds, p_totals + K, p_reach + K, p_reach + 2 * K, p_states + flow,
        p_states + 2 * flow, HAS_STATES,
    )  # fmt: skip
    fence_async_shared()
    dq_b, dk_b, dg = one_direction(
        s_upper, s_gb, s_q, s_k, s_v, s_do, s_sb, s_dsb, s_sds, s_gf, s_kb,
        p_totals + K, -zero, gl.minimum(H, 0), True,
    )  # fmt: skip
    nothing = gl.zeros([C, C], gl.float32, layout=TOKENS)
    rows = gl.arange(0, C, layout=gl.SliceLayout(1, TOKENS))[:, None]
    cols = gl.arange(0, C, layout=gl.SliceLayout(0, TOKENS))[None, :]
    dq = held_pairs(((dq_f + dq_b) * scale).to(gl.bfloat16))
    dk = held_pairs(((dk_f + dk_b) * scale).to(gl.bfloat16))
    dg = warpgroup_mma_wait(0, deps=[dg])
    write_rows((dg * scale).to(gl.bfloat16), s_gb, p_dgb + out, H * K, n, K)
    out = (b * N + t) * dk_n + h * K
    write_rows(dq, s_q, p_dq + out, dk_n, n, K)
    write_rows(dk, s_k, p_dk + out, dk_n, n, K)
    # Row j gives, column i receives. q with its backward decays is where the gates were.
    a_f = warpgroup_mma(s_kf, s_qf.permute((1, 0)), nothing, use_acc=False, is_async=True)
    a_b = warpgroup_mma(s_kb, s_gf.permute((1, 0)), nothing, use_acc=False, is_async=True)
    a_f, a_b = warpgroup_mma_wait(0, deps=[a_f, a_b])
    a = gl.where(rows <= cols, a_f, zero) + gl.where(rows >= cols, a_b, zero)
    a = gl.convert_layout(a.to(gl.bfloat16), LEFT_TOKENS)
    dv = warpgroup_mma(a, s_do, nothing, use_acc=False, is_async=True)
    dv = warpgroup_mma(s_kf, s_dsf.permute((1, 0)), dv, is_async=True)
    dv = warpgroup_mma(s_kb, s_dsb.permute((1, 0)), dv, is_async=True)
    dv = warpgroup_mma_wait(0, deps=[dv])
    p_dv += (b * N + t) * dv_n + h * V
    write_rows((dv * scale).to(gl.bfloat16), s_v, p_dv, dv_n, n, V)


@lru_cache(maxsize=1024)
def segment_length(n_chunks: int, heads: int, processors: int) -> int:
    """Chunks of a segment, which four programs walk, one a flow.

    The fewest rounds of the shortest programs. Longer segments than `SEGMENT` gain nothing.
    """
    if n_chunks <= ONE_SEGMENT and 4 * heads >= processors:
        return n_chunks

    def cost(chunks: int) -> int:
        programs = 4 * heads * ceil_div(n_chunks, chunks)
        return duration(programs, RESIDENT * processors, chunks, OVERHEAD)

    return min(range(1, min(SEGMENT, n_chunks) + 1), key=cost)


def backward_in_gluon(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, do: Tensor, scale: float,
    chunks: int | None = None, into: Into | None = None,
) -> Gradients:  # fmt: skip
    """Launches the backward: gradients of q, k, v and both gates.

    Args:
        q, k, v, gf, gb, do: As in `bidirectional_gla`, and the output's gradient, (B, N, H, V);
            bfloat16, key dim 32, value dim 64, rows aligned to 16 bytes and contiguous.
        scale: Factor of q.
        chunks: Chunks of a segment; as many as fill the device where None.
        into: As of `bigla_bwd.backward`.
    """
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    heads, n_chunks = b * h, ceil_div(n, CHUNK)
    chunks = chunks or segment_length(n_chunks, heads, multiprocessors(q.device))
    n_segments = ceil_div(n_chunks, chunks)
    several = n_segments > 1
    inputs = (q, k, v, gf, gb, do)
    local = q.new_empty(heads, n_chunks, 4, dv, dk)
    table = triangles(CHUNK, q.device)
    sizes = (
        (heads if several else 0, n_chunks, 4, dk),
        (heads, n_chunks, 2, dk),
        (2 if several else 0, heads, n_segments, dk),
        (3, heads, n_segments),
        (4 if several else 0, heads, n_segments, dv, dk),
    )
    reach, totals, decays, weakest, states = (q.new_empty(s, dtype=torch.float32) for s in sizes)
    states_kernel[(4 * heads * n_segments,)](
        *inputs, local, reach, totals, states, decays, weakest, table, *strides(*inputs),
        n, h, n_chunks, n_segments, chunks, HAS_STATES=several, STAGES=STAGES, **LAUNCH,
    )  # fmt: skip
    if several:
        scan_states(states, decays)
    outputs = new_outputs(inputs, 1, into)
    rows = row_strides(outputs)
    p = make_plan(q, v, grads=True)
    # Never a segment's first chunk, whose program writes what the exact form reads.
    tail = 0 < n % CHUNK <= TAIL and (n_chunks - 1) % chunks > 0
    n_done = n_chunks - tail
    grads_kernel[(heads * n_done,)](
        *inputs, *outputs, local, reach, totals, states, weakest, table[1], 0.5 * scale,
        *strides(*inputs), *rows, b, n, h, n_segments, n_chunks, chunks, n_done,
        HAS_STATES=several, **LAUNCH,
    )  # fmt: skip
    if tail:
        tail_grads_kernel[(heads,)](
            *inputs, *outputs, local, reach, totals, states, 0.5 * scale, *strides(*inputs), *rows,
            n, h, n_segments, n_chunks, K=dk, V=dv, C=CHUNK, R=TAIL, OP=p.op,
            PRECISION=p.precision, HAS_STATES=several, **TAIL_LAUNCH,
        )  # fmt: skip
    # Segments with strong gates, the others return at once; `local` is free and serves as scratch.
    grad_kernel[heads, n_segments, 1](
        *inputs, *outputs, states, weakest[2], local, 0.5 * scale, *strides(*inputs), *rows,
        b, n, h, n_segments, n_chunks, chunks, K=dk, V=dv, BK=dk, BV=dv, C=CHUNK, OP=p.op,
        PRECISION=p.precision, HAS_STATES=several, EXACT=True, **p.exact,
    )  # fmt: skip
    return outputs
