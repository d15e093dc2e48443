"""What each segment adds to the states, in Gluon: one kernel, for `bigla_fwd_gluon.py`.

As the kernel of this name in `bigla_fwd_edges.py`, and with it the part of the states that enter
each chunk from the right that comes from the chunks of the same segment, so that the output needs
no sweep of its own. Key dim 32, value dim 64, chunks of 64 tokens, bfloat16.
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
    WIDE,
    C,
    K,
    V,
    await_previous,
    copy_rows,
    decayed,
    held,
    segment_chunks,
    store_rows,
    write_rows,
)
from mmvig.kernels.launch import kernel


@gluon.jit
def copy_chunk(
    s_k, s_v, s_gf, s_gb, stage, p_k, p_v, p_gf, p_gb, k_n, v_n, gf_n, gb_n, i_c, n, z,
):  # fmt: skip
    """Starts the copies of chunk i_c of a segment of n tokens to their `stage`."""
    t = (i_c * 64 + z).to(gl.int64)
    left = n - i_c * 64
    copy_rows(s_gf.index(stage), p_gf + t * gf_n, gf_n, left, 32, z)
    copy_rows(s_gb.index(stage), p_gb + t * gb_n, gb_n, left, 32, z)
    copy_rows(s_k.index(stage), p_k + t * k_n, k_n, left, 32, z)
    copy_rows(s_v.index(stage), p_v + t * v_n, v_n, left, 64, z)


@kernel(sizes=['N', 'H', 'n_segments', 'n_chunks'], jit=gluon.jit)
def adds_kernel(
    p_k, p_v, p_gf, p_gb, p_adds, p_decays, p_stack, p_reach, p_weakest, p_ahead,
    k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, n_segments, n_chunks,
):  # fmt: skip
    """What each segment adds to S_f and S_b, and its decays. Program: (b, segment, h); 4 warps.

    Walks right to left, and stacks S_b before each chunk, as if nothing entered the segment, but
    for its last chunk, where that is zero.

    k, gates (B, N, H, K), v (B, N, H, V), adds (flow, B*H, segment, V, K), stack (B*H, chunk, V,
    K), bfloat16; decays (flow, B*H, segment, K) in bits, reach (B*H, chunk, K), the decay from the
    segment's right edge to the chunk, a factor, and weakest (B*H, segment), the strongest decay of
    a chunk, float32; ahead (C, C) ones below the diagonal, bfloat16. Products accumulate in
    float32.
    """
    await_previous()
    pid = gl.program_id(0)
    h = pid % H
    i_s = pid // H % n_segments
    b = (pid // H // n_segments).to(gl.int64)
    first, size = segment_chunks(i_s, n_segments, n_chunks)
    t = first.to(gl.int64) * C
    n = N - first * C
    p_k += b * k_b + h * k_h + t * k_n
    p_v += b * v_b + h * v_h + t * v_n
    p_gf += b * gf_b + h * gf_h + t * gf_n
    p_gb += b * gb_b + h * gb_h + t * gb_n
    head = b * H + h
    p_stack += (head * n_chunks + first) * (K * V)
    p_reach += (head * n_chunks + first) * K

    s_gf = gl.allocate_shared_memory(gl.bfloat16, [2, C, K], NARROW)
    s_gb = gl.allocate_shared_memory(gl.bfloat16, [2, C, K], NARROW)
    s_k = gl.allocate_shared_memory(gl.bfloat16, [2, C, K], NARROW)
    s_v = gl.allocate_shared_memory(gl.bfloat16, [2, C, V], WIDE)
    s_ahead = gl.allocate_shared_memory(gl.bfloat16, [C, C], WIDE)
    s_state = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    copy_rows(s_ahead, p_ahead, C, C, C)
    last = size - 1
    copy_chunk(
        s_k, s_v, s_gf, s_gb, last % 2, p_k, p_v, p_gf, p_gb, k_n, v_n, gf_n, gb_n, last, n, 0,
    )  # fmt: skip
    async_copy.commit_group()

    none = gl.zeros([C, K], gl.float32, layout=KEYS)
    ones = gl.full([C, C], 1.0, gl.bfloat16, layout=LEFT_KEYS)
    right = gl.zeros([V, K], gl.float32, layout=KEYS)
    left = gl.zeros([V, K], gl.float32, layout=KEYS)
    # All rows of totals are the same; the first is stored.
    total_f = gl.zeros([V, K], gl.float32, layout=KEYS)
    total_b = gl.zeros([V, K], gl.float32, layout=KEYS)
    weakest = gl.zeros([V], gl.float32, layout=gl.SliceLayout(1, KEYS))
    row = gl.arange(0, V, layout=gl.SliceLayout(1, KEYS))[:, None]
    col = gl.arange(0, K, layout=gl.SliceLayout(0, KEYS))[None, :]
    at = row * K + col
    zero = gl.minimum(N, 0)
    for step in range(size):
        i_c = last - step
        stage = i_c % 2
        z = i_c & zero
        async_copy.wait_group(0)
        fence_async_shared()
        s_kf = s_gf.index(stage)
        s_kb = s_gb.index(stage)
        own_f = warpgroup_mma(ones, s_kf, none, use_acc=False, is_async=True)
        own_b = warpgroup_mma(ones, s_kb, none, use_acc=False, is_async=True)
        s_state.store(left.to(gl.bfloat16))
        # Into the memory of the step before, which all warps have left.
        rest = gl.where(i_c > 0, n, 0)
        copy_chunk(
            s_k, s_v, s_gf, s_gb, 1 - stage, p_k, p_v, p_gf, p_gb, k_n, v_n, gf_n, gb_n,
            gl.where(i_c > 0, i_c - 1, 0), rest, z,
        )  # fmt: skip
        async_copy.commit_group()
        own_f, own_b = warpgroup_mma_wait(0, deps=[own_f, own_b])
        c = warpgroup_mma(s_ahead.permute((1, 0)), s_kf, none, use_acc=False, is_async=True)
        d = warpgroup_mma(s_ahead, s_kb, none, use_acc=False, is_async=True)
        own_f = own_f * LOG2E
        own_b = own_b * LOG2E
        weakest = gl.minimum(weakest, gl.min(gl.minimum(own_f, own_b), 1))
        gl.store(p_reach + i_c * K + at, gl.exp2(total_b), mask=at < K)
        total_b = held(total_b + own_b)
        left = held(left * gl.exp2(own_b))
        c, d = warpgroup_mma_wait(0, deps=[c, d])
        # Where the gates were.
        k = s_k.index(stage).load(KEYS)
        s_kf.store(decayed(k, c * LOG2E))
        s_kb.store(decayed(k, d * LOG2E))
        fence_async_shared()
        y = s_v.index(stage).permute((1, 0))
        left = warpgroup_mma(y, s_kb, left, is_async=True)
        added = warpgroup_mma(y, s_kf, none, use_acc=False, is_async=True)
        store_rows(s_state, p_stack + i_c * (K * V), K, gl.where(step > 0, V, 0), K, z)
        left, added = warpgroup_mma_wait(0, deps=[left, added])
        # Decayed by what lies right of the chunk, so that the walk is the same.
        right += added * gl.exp2(total_f)
        total_f += own_f
    slot = head * n_segments + i_s
    flow = gl.num_programs(0).to(gl.int64)
    gl.store(p_decays + slot * K + at, total_f, mask=at < K)
    gl.store(p_decays + (flow + slot) * K + at, total_b, mask=at < K)
    each = gl.arange(0, V, layout=gl.SliceLayout(1, KEYS))
    gl.store(p_weakest + slot + each, weakest, mask=each == 0)
    write_rows(right.to(gl.bfloat16), s_k.index(0), p_adds + slot * (K * V), K, 64, K)
    p_adds += (flow + slot) * (K * V)
    write_rows(left.to(gl.bfloat16), s_k.index(1), p_adds, K, 64, K)
