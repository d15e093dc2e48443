"""The states that enter each chunk, in Gluon: one kernel, for `bigla_bwd_gluon.py`.

Notation, flows and results are those of `bigla_bwd_states.py`, and so is the arithmetic. Gluon
places what the compiler places in Triton: the copies of the next chunk start while this one is in
work, into memory that all warps have left; the products of a chunk's gates are in flight while the
state before it is stored, and that store while the product that continues the state is. Key dim
32, value dim 64, chunks of 64 tokens, bfloat16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mmvig.kernels.bigla_gluon_tiles import (
    KEYS,
    LEFT_KEYS,
    LOG2E,
    NARROW,
    ROWS_K,
    WIDE,
    C,
    K,
    V,
    await_previous,
    copy_rows,
    decayed,
)
from mmvig.kernels.launch import kernel


@gluon.jit
def copy_chunk(s_x, s_y, s_g, stage, p_x, p_y, p_g, x_n, y_n, g_n, i_c, N, valid, gates):
    """Starts the copies of chunk i_c of x, y and g to their `stage`, or of zeros if not valid.

    `gates` says whether those of g are.
    """
    t = i_c.to(gl.int64) * C
    n = gl.where(gates, N - i_c * C, 0)
    copy_rows(s_g.index(stage), p_g + t * g_n, g_n, n, K)
    n = gl.where(valid, N - i_c * C, 0)
    copy_rows(s_x.index(stage), p_x + t * x_n, x_n, n, K)
    copy_rows(s_y.index(stage), p_y + t * y_n, y_n, n, V)


@kernel(sizes=['N', 'H', 'n_chunks', 'n_segments', 'chunks'], jit=gluon.jit)
def states_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_local, p_reach, p_totals, p_states, p_decays, p_weakest,
    p_table,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    do_b, do_n, do_h, N, H, n_chunks, n_segments, chunks,
    HAS_STATES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Walks a segment in the direction of one flow. Program: (b, segment, h, flow); 4 warps.

    Where it is the only one, nothing follows its last chunk, which adds to no state then.

    Inputs (B, N, H, K or V), bfloat16, and the table of `triangles`. Results as of
    `local_states_kernel`: local (B*H, chunk, flow, V, K), bfloat16; totals (B*H, chunk, direction,
    K), and if `HAS_STATES` reach (B*H, chunk, flow, K), states (flow, B*H, segment, V, K) and
    decays (direction, B*H, segment, K), float32. Beyond those weakest (direction, B*H, segment),
    float32: half the strongest decay of a chunk. Decays are in bits; products accumulate in
    float32.
    """
    await_previous()
    pid = gl.program_id(0)
    flow = pid % 4
    h = pid // 4 % H
    i_s = pid // (4 * H) % n_segments
    b = (pid // (4 * H) // n_segments).to(gl.int64)
    first = i_s * chunks
    last = gl.minimum(first + chunks, n_chunks) - 1
    leftward = flow % 2 == 1
    of_grads = flow >= 2
    by_fwd = (flow == 0) | (flow == 3)
    if of_grads:
        p_x = p_q + (b * q_b + h * q_h)
        p_y = p_do + (b * do_b + h * do_h)
        x_n = q_n
        y_n = do_n
    else:
        p_x = p_k + (b * k_b + h * k_h)
        p_y = p_v + (b * v_b + h * v_h)
        x_n = k_n
        y_n = v_n
    if by_fwd:
        p_g = p_gf + (b * gf_b + h * gf_h)
        g_n = gf_n
        direction = 0
    else:
        p_g = p_gb + (b * gb_b + h * gb_h)
        g_n = gb_n
        direction = 1
    head = b * H + h
    p_local += (head * n_chunks * 4 + flow) * K * V
    p_reach += (head * n_chunks * 4 + flow) * K
    p_totals += (head * n_chunks * 2 + direction) * K

    s_x = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, K], NARROW)
    s_g = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, K], NARROW)
    s_y = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, V], WIDE)
    s_decayed = gl.allocate_shared_memory(gl.bfloat16, [C, K], NARROW)
    s_state = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    s_beyond = gl.allocate_shared_memory(gl.bfloat16, [C, C], WIDE)
    # Of the table, which has ones up to, from, after and before each token: what lies between it
    # and the edge that the flow runs to; in dS its own gate counts, too.
    which = gl.where(of_grads, gl.where(leftward, 0, 1), gl.where(leftward, 3, 2))
    copy_rows(s_beyond, p_table + which * C * C, C, C, C)
    steps = last - first + 1
    walked = steps if HAS_STATES else steps - 1
    summed = gl.where(of_grads, walked, steps)
    begin = gl.where(leftward, last, first)
    sign = gl.where(leftward, -1, 1)
    for ahead in gl.static_range(STAGES - 1):
        copy_chunk(
            s_x, s_y, s_g, ahead, p_x, p_y, p_g, x_n, y_n, g_n, begin + sign * ahead, N,
            ahead < walked, ahead < summed,
        )  # fmt: skip
        async_copy.commit_group()

    ones = gl.full([C, C], 1.0, gl.bfloat16, layout=LEFT_KEYS)
    none = gl.zeros([C, K], gl.float32, layout=KEYS)
    reach = gl.zeros([V, K], gl.float32, layout=KEYS)
    weakest = gl.zeros([V, K], gl.float32, layout=KEYS)
    state = gl.zeros([V, K], gl.float32, layout=KEYS)
    # All rows of `reach` and of a chunk's total are the same; the first is stored.
    row = gl.arange(0, V, layout=gl.SliceLayout(1, KEYS))[:, None]
    col = gl.arange(0, K, layout=gl.SliceLayout(0, KEYS))[None, :]
    at_row = gl.arange(0, V, layout=gl.SliceLayout(1, ROWS_K))[:, None]
    at_col = gl.arange(0, K, layout=gl.SliceLayout(0, ROWS_K))[None, :]
    at = at_row * K + at_col
    for step in range(walked):
        i_c = begin + sign * step
        stage = step % STAGES
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        bits = warpgroup_mma(s_beyond, s_g.index(stage), none, use_acc=False, is_async=True)
        total = warpgroup_mma(ones, s_g.index(stage), none, use_acc=False, is_async=True)
        s_state.store(state.to(gl.bfloat16))
        if HAS_STATES:
            gl.store(p_reach + i_c * 4 * K + (row * K + col), reach, mask=(row == 0) & (col < K))
        bits, total = warpgroup_mma_wait(0, deps=[bits, total])
        total = total * LOG2E
        s_decayed.store(decayed(s_x.index(stage).load(KEYS), bits * LOG2E))
        fence_async_shared()
        y = s_y.index(stage).permute((1, 0))
        state = warpgroup_mma(y, s_decayed, state * gl.exp2(total), is_async=True)
        to = p_totals + i_c * 2 * K
        gl.store(to + (row * K + col), total, mask=(row == 0) & (col < K) & (flow < 2))
        reach += total
        weakest = gl.minimum(weakest, total)
        to = p_local + i_c.to(gl.int64) * 4 * K * V
        gl.store(to + at, s_state.load(ROWS_K), mask=(at < K * V) & (step > 0))
        # Into the memory of the step before, which all warps have left.
        later = step + STAGES - 1
        copy_chunk(
            s_x, s_y, s_g, later % STAGES, p_x, p_y, p_g, x_n, y_n, g_n, begin + sign * later, N,
            later < walked, later < summed,
        )  # fmt: skip
        async_copy.commit_group()
        state = warpgroup_mma_wait(0, deps=[state])
    if not HAS_STATES:
        i_c = begin + sign * walked
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        s_g_ = s_g.index(walked % STAGES)
        total = warpgroup_mma(ones, s_g_, none, use_acc=False, is_async=True)
        s_state.store(state.to(gl.bfloat16))
        to = p_local + i_c.to(gl.int64) * 4 * K * V
        gl.store(to + at, s_state.load(ROWS_K), mask=(at < K * V) & (walked > 0))
        total = warpgroup_mma_wait(0, deps=[total]) * LOG2E
        to = p_totals + i_c * 2 * K
        gl.store(to + (row * K + col), total, mask=(row == 0) & (col < K) & (flow < 2))
        weakest = gl.minimum(weakest, total)
    slots = (gl.num_programs(0) // 4).to(gl.int64)
    slot = head * n_segments + i_s
    if flow < 2:
        slot_d = direction * slots + slot
        if HAS_STATES:
            gl.store(p_decays + slot_d * K + (row * K + col), reach, mask=(row == 0) & (col < K))
        half = 0.5 * gl.min(weakest, 1)
        each = gl.arange(0, V, layout=gl.SliceLayout(1, KEYS))
        gl.store(p_weakest + slot_d + each, half, mask=each == 0)
    if HAS_STATES:
        gl.store(p_states + (flow * slots + slot) * K * V + (row * K + col), state)
