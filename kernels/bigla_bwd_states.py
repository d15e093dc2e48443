"""The four states that enter each chunk, for the backward of `bidirectional_gla` by chunks.

They are kept in two parts: what comes from the chunks of the same segment, in the dtype of
products, and what enters the segment, float32, as `scan_states_kernel` leaves it. Notation:
`bigla_tiles.py`; flows are S_f, S_b, dS_b, dS_f.
"""

import triton
import triton.language as tl

from mmvig.kernels.bigla_tiles import load_state, load_tile, store_state, sum_gates
from mmvig.kernels.launch import await_previous, kernel


@kernel(sizes=['N', 'H', 'n_chunks', 'n_segments', 'chunks'])
def local_states_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_local, p_reach, p_totals, p_states, p_decays, p_upper,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, N, H, n_chunks, n_segments, chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks a segment in the direction of one flow. Program: (b, segment, h, flow) x V block.

    Inputs (B, N, H, K or V). Writes local (B*H, chunk, flow, V, K), of dtype OP: what enters a
    chunk from those of its segment (not written, since zero, where it is the first to be walked);
    reach (B*H, chunk, flow, K): the decay from the segment's edge to the chunk; totals (B*H, chunk,
    direction, K): that of the chunk; states (flow, B*H, segment, V, K), unless there is one segment
    only, and decays (direction, B*H, segment, K): what the segment adds, and its decay; upper
    (C, C): ones where the column is the row or right of it, a table for `chunk_grads_kernel`.
    Float32 except local and upper (bfloat16); decays in bits.
    """
    await_previous()
    pid = tl.program_id(0)
    flow = pid % 4
    h = pid // 4 % H
    i_s = pid // (4 * H) % n_segments
    b = pid // (4 * H) // n_segments
    v0 = tl.program_id(1) * BV
    first = i_s * chunks
    last = tl.minimum(first + chunks, n_chunks) - 1
    leftward = flow % 2 == 1
    of_grads = flow >= 2
    by_fwd = (flow == 0) | (flow == 3)
    wide = tl.zeros((), tl.int64)
    b += wide
    p_x = p_q + b * q_b + h * q_h if of_grads else p_k + b * k_b + h * k_h
    p_y = p_do + b * do_b + h * do_h if of_grads else p_v + b * v_b + h * v_h
    p_g = p_gf + b * gf_b + h * gf_h if by_fwd else p_gb + b * gb_b + h * gb_h
    x_n = tl.where(of_grads, q_n, k_n)
    y_n = tl.where(of_grads, do_n, v_n)
    g_n = tl.where(by_fwd, gf_n, gb_n)
    head = b * H + h
    direction = tl.where(by_fwd, 0, 1)
    p_local += (head * n_chunks * 4 + flow) * K * V
    p_reach += (head * n_chunks * 4 + flow) * K
    p_totals += (head * n_chunks * 2 + direction) * K
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    # Tokens between j and the edge that the flow runs to; in dS token j's own gate counts, too.
    beyond = tl.where(leftward, j < i, j > i) | ((j == i) & of_grads)
    weights = beyond.to(tl.float32).to(tl.bfloat16)
    if pid == 0:
        tl.store(p_upper + i * C + j, (j >= i).to(tl.float32).to(tl.bfloat16))
    ones = tl.full((BV, C), 1.0, tl.float32).to(tl.bfloat16)
    state = tl.zeros((BV, BK), tl.float32)
    reach = tl.zeros((BV, BK), tl.float32)
    # All rows of `reach` and of a chunk's total are the same; the first is stored.
    cols = tl.arange(0, BK)[None, :]
    once = (tl.arange(0, BV)[:, None] == 0) & (cols < K) & (v0 == 0)
    vector = cols + tl.zeros((BV, BK), tl.int32)
    for step in range(last - first + 1):
        i_c = tl.where(leftward, last - step, first + step)
        t = (wide + i_c) * C
        n = N - i_c * C
        x = load_tile(p_x + t * x_n, x_n, n, K, C, BK, BK != K)
        y = load_tile(p_y + t * y_n + v0, y_n, n, V - v0, C, BV, V % BV != 0).to(OP)
        g = load_tile(p_g + t * g_n, g_n, n, K, C, BK, BK != K)
        if step > 0:
            store_state(p_local + (wide + i_c) * 4 * K * V, state, K, V, v0, BK, BV)
        tl.store(p_reach + i_c * 4 * K + vector, reach, mask=once)
        total = sum_gates(ones, g)
        tl.store(p_totals + i_c * 2 * K + vector, total, mask=once & (flow < 2))
        x = (x.to(tl.float32) * tl.exp2(sum_gates(weights, g))).to(OP)
        state *= tl.exp2(total)
        state = tl.dot(tl.trans(y), x, state, input_precision=PRECISION)
        reach += total
    if flow < 2:
        slot = (direction * (tl.num_programs(0) // 4)).to(tl.int64) + head * n_segments + i_s
        tl.store(p_decays + slot * K + vector, reach, mask=once)
    if n_segments > 1:
        slot = (flow + wide) * (tl.num_programs(0) // 4) + head * n_segments + i_s
        store_state(p_states + slot * K * V, state, K, V, v0, BK, BV)


@triton.jit
def entering(
    p_local, p_reach, p_states, half, inside, K, V, v0, BK: tl.constexpr, BV: tl.constexpr,
    HAS_STATES: tl.constexpr,
):  # fmt: skip
    """A state that enters a chunk, decayed by `half` (BK,) more bits: float32 (BV, BK).

    Pointers are those of the chunk and flow, and of the segment; `inside` says whether chunks of
    the segment add to the state, `HAS_STATES` whether there are several segments.
    """
    s = load_state(p_local, K, V, v0, BK, BV, inside).to(tl.float32) * tl.exp2(half)[None, :]
    if HAS_STATES:
        cols = tl.arange(0, BK)
        reach = tl.load(p_reach + cols, mask=cols < K, other=0.0)
        s += load_state(p_states, K, V, v0, BK, BV).to(tl.float32) * tl.exp2(reach + half)[None, :]
    return s


@triton.jit
def entering_pair(
    p_s, p_ds, p_s_reach, p_ds_reach, p_s_in, p_ds_in, half, s_inside, ds_inside, K, V, v0,
    BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """One direction's S and dS at the middle of a chunk's decay, and their product: (BV, BK)."""
    s = entering(p_s, p_s_reach, p_s_in, half, s_inside, K, V, v0, BK, BV, HAS_STATES)
    ds = entering(p_ds, p_ds_reach, p_ds_in, half, ds_inside, K, V, v0, BK, BV, HAS_STATES)
    return s.to(OP), ds.to(OP), (s * ds).to(OP)
