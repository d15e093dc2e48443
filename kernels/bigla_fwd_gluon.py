"""Forward of `bidirectional_gla` from the chunk's edges in Gluon, for Hopper: output and launcher.

Formulas and notation: `bigla_fwd_edges.py`; what segments add, and the leftward states within
them, come from `bigla_fwd_gluon_adds.py`, the scan and the exact form are Triton's. On what Gluon
changes, see `bigla_bwd_gluon.py`. A sequence of up to four chunks that is one segment is held in
shared memory, where two programs share a multiprocessor, and swept for its leftward states. Of
longer ones the tiles of the next chunk are copied while this one is in work, and 168 registers and
72 KB let a multiprocessor hold three programs. Key dim 32, value dim 64, chunks of 64 tokens,
bfloat16. Only `bigla_fwd.py` imports this, where Triton has this Gluon.
"""

import math
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

from mmvig.kernels.bigla_fwd_edges import scan_kernel
from mmvig.kernels.bigla_fwd_exact import launch_exact
from mmvig.kernels.bigla_fwd_gluon_adds import adds_kernel
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
    segment_chunks,
    write_rows,
)
from mmvig.kernels.bigla_plan import duration, make_plan
from mmvig.kernels.bigla_tiles import strides, triangles
from mmvig.kernels.grid import ceil_div, multiprocessors
from mmvig.kernels.launch import kernel

HELD = 4  # chunks of a sequence that shared memory holds
HELD_LAUNCH = dict(num_warps=4)  # two programs a multiprocessor
ROUNDS = 32  # of programs that are looked at


@gluon.jit
def copy_values(
    s_gb, s_k, s_v, slot, p_gb, p_k, p_v, gb_n, k_n, v_n, i_c, n, z=0,
):  # fmt: skip
    """Starts the copies of what the leftward state needs of chunk i_c of a segment of n tokens."""
    t = (i_c * 64 + z).to(gl.int64)
    left = n - i_c * 64
    copy_rows(s_gb.index(slot), p_gb + t * gb_n, gb_n, left, 32, z)
    copy_rows(s_k.index(slot), p_k + t * k_n, k_n, left, 32, z)
    copy_rows(s_v.index(slot), p_v + t * v_n, v_n, left, 64, z)


@gluon.jit
def copy_queries(s_gf, s_q, stage, p_gf, p_q, gf_n, q_n, i_c, n, z=0):
    """As `copy_values`, of what the output needs beyond."""
    t = (i_c * 64 + z).to(gl.int64)
    left = n - i_c * 64
    copy_rows(s_gf.index(stage), p_gf + t * gf_n, gf_n, left, 32, z)
    copy_rows(s_q.index(stage), p_q + t * q_n, q_n, left, 32, z)


@gluon.jit
def stack_held(s_gb, s_k, s_v, s_sb, s_decayed, s_upto, steps):
    """Stacks, in s_sb, the S_b that enter the chunks before the last, number `steps`.

    For a sequence that is one segment and held in shared memory; the last chunk is there.
    """
    none = gl.zeros([C, K], gl.float32, layout=KEYS)
    ones = gl.full([C, C], 1.0, gl.bfloat16, layout=LEFT_KEYS)
    s_b = gl.zeros([V, K], gl.float32, layout=KEYS)
    for step in range(steps):
        slot = steps - step
        fence_async_shared()
        g = s_gb.index(slot)
        d = warpgroup_mma(s_upto.permute((1, 0)), g, none, use_acc=False, is_async=True)
        total = warpgroup_mma(ones, g, none, use_acc=False, is_async=True)
        s_sb.index(slot).store(s_b.to(gl.bfloat16))
        d, total = warpgroup_mma_wait(0, deps=[d, total])
        total = total * LOG2E
        s_decayed.store(decayed(s_k.index(slot).load(KEYS), total - d * LOG2E))
        fence_async_shared()
        s_b = s_b * gl.exp2(total)
        s_b = warpgroup_mma(s_v.index(slot).permute((1, 0)), s_decayed, s_b, is_async=True)
        s_b = warpgroup_mma_wait(0, deps=[s_b])
        async_copy.wait_group(0)
    s_sb.index(0).store(s_b.to(gl.bfloat16))


@gluon.jit
def add_entering(s_own, s_entering, reach):
    """Adds to the S_b of the segment's own chunks, in place, what enters it, decayed up to here."""
    s = s_own.load(ROWS_K).to(gl.float32)
    s += s_entering.load(ROWS_K).to(gl.float32) * reach[None, :]
    s_own.store(s.to(gl.bfloat16))


@kernel(sizes=['N', 'H', 'n_segments', 'n_chunks'], jit=gluon.jit)
def out_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_o, p_right, p_stack, p_reach, p_weakest, p_table, bits,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, n_segments, n_chunks, HAS_STATES: gl.constexpr,
):  # fmt: skip
    """o of one segment, q times 2 to the `bits`. Program: (b, segment, h); 4 warps.

    q, k, gates (B, N, H, K), v, o (B, N, H, V), bfloat16, o contiguous; right, weakest and table as
    of the kernel of this name in `bigla_fwd_edges.py`; stack and reach as `adds_kernel` and the
    scan leave them: the last chunk of each segment has the S_b that enters, the others what the
    segment's own chunks add to it. Without states (`HAS_STATES`) the sequence is one segment, stays
    in shared memory, and is swept for the leftward states first. Products accumulate in float32.
    """
    await_previous()
    SPACES: gl.constexpr = 2 if HAS_STATES else 4
    pid = gl.program_id(0)
    h = pid % H
    i_s = pid // H % n_segments
    b = (pid // H // n_segments).to(gl.int64)
    first, size = segment_chunks(i_s, n_segments, n_chunks)
    t = first.to(gl.int64) * C
    n = N - first * C
    p_q += b * q_b + h * q_h + t * q_n
    p_k += b * k_b + h * k_h + t * k_n
    p_v += b * v_b + h * v_h + t * v_n
    p_gf += b * gf_b + h * gf_h + t * gf_n
    p_gb += b * gb_b + h * gb_h + t * gb_n
    p_o += ((b * N + t) * H + h) * V
    head = b * H + h
    segment = head * n_segments + i_s
    p_stack += (head * n_chunks + first) * (K * V)
    p_reach += (head * n_chunks + first) * K

    s_gf = gl.allocate_shared_memory(gl.bfloat16, [2, C, K], NARROW)
    s_q = gl.allocate_shared_memory(gl.bfloat16, [2, C, K], NARROW)
    s_gb = gl.allocate_shared_memory(gl.bfloat16, [SPACES, C, K], NARROW)
    s_k = gl.allocate_shared_memory(gl.bfloat16, [SPACES, C, K], NARROW)
    s_v = gl.allocate_shared_memory(gl.bfloat16, [SPACES, C, V], WIDE)
    s_sb = gl.allocate_shared_memory(gl.bfloat16, [SPACES, V, K], NARROW)
    s_state = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    # With states the S_b that enters the segment, without them the sweep's keys with their decays.
    s_aside = gl.allocate_shared_memory(gl.bfloat16, [V, K], NARROW)
    s_upto = gl.allocate_shared_memory(gl.bfloat16, [C, C], WIDE)
    last = size - 1
    copy_rows(s_upto, p_table, C, C, C)
    if HAS_STATES:
        copy_values(s_gb, s_k, s_v, 0, p_gb, p_k, p_v, gb_n, k_n, v_n, last * 0, n)
        copy_rows(s_sb.index(0), p_stack, K, gl.where(last > 0, V, 0), K)
        copy_rows(s_aside, p_stack + last * (K * V), K, V, K)
    else:
        copy_values(s_gb, s_k, s_v, last, p_gb, p_k, p_v, gb_n, k_n, v_n, last, n)
        async_copy.commit_group()
        for chunk in gl.static_range(SPACES - 1):
            c = gl.to_tensor(chunk)
            if c < last:
                copy_values(s_gb, s_k, s_v, c, p_gb, p_k, p_v, gb_n, k_n, v_n, c, n)
    copy_queries(s_gf, s_q, 0, p_gf, p_q, gf_n, q_n, last * 0, n)
    async_copy.commit_group()

    none = gl.zeros([C, K], gl.float32, layout=KEYS)
    nothing = gl.zeros([C, V], gl.float32, layout=TOKENS)
    ones = gl.full([C, C], 1.0, gl.bfloat16, layout=LEFT_KEYS)
    row = gl.arange(0, V, layout=gl.SliceLayout(1, KEYS))[:, None]
    col = gl.arange(0, K, layout=gl.SliceLayout(0, KEYS))[None, :]
    at = row * K + col
    channels = gl.arange(0, K, layout=gl.SliceLayout(0, ROWS_K))
    # Zeros unknown to the compiler, which else keeps addresses and masks in registers over the
    # loops, and rounds masked tiles element by element.
    zero = gl.minimum(N, 0)
    masked = zero.to(gl.float32)
    if HAS_STATES:
        s_f = gl.load(p_right + segment * (K * V) + at).to(gl.float32)
    else:
        s_f = gl.zeros([V, K], gl.float32, layout=KEYS)
        gl.store(p_stack + last * (K * V) + at, s_f.to(gl.bfloat16))
        weakest = gl.zeros([C], gl.float32, layout=gl.SliceLayout(1, KEYS))
        async_copy.wait_group(1)
        stack_held(s_gb, s_k, s_v, s_sb, s_aside, s_upto, last)
    for step in range(size):
        i_c = gl.to_tensor(step)
        stage = i_c % 2
        slot = i_c % SPACES
        z = i_c & zero
        if HAS_STATES:
            reach = gl.load(p_reach + i_c * K + (channels + z))
        async_copy.wait_group(0)
        fence_async_shared()
        s_kf = s_gf.index(stage)
        s_kb = s_gb.index(slot)
        s_state.store(s_f.to(gl.bfloat16))
        bits_f = warpgroup_mma(s_upto, s_kf, none, use_acc=False, is_async=True)
        bits_b = warpgroup_mma(s_upto.permute((1, 0)), s_kb, none, use_acc=False, is_async=True)
        total = warpgroup_mma(ones, s_kf, none, use_acc=False, is_async=True)
        # Into the memory of the step before, which all warps have left.
        rest = gl.where(i_c < last, n, 0)
        copy_queries(s_gf, s_q, 1 - stage, p_gf, p_q, gf_n, q_n, i_c + 1, rest, z)
        if HAS_STATES:
            later = (i_c + 1) % SPACES
            copy_values(s_gb, s_k, s_v, later, p_gb, p_k, p_v, gb_n, k_n, v_n, i_c + 1, rest, z)
            rows = gl.where(i_c + 1 < last, V, 0)
            copy_rows(s_sb.index(later), p_stack + (i_c + 1) * (K * V), K, rows, K, z)
        async_copy.commit_group()
        if HAS_STATES:
            add_entering(s_sb.index(slot), s_aside, reach)
        bits_f, bits_b, total = warpgroup_mma_wait(0, deps=[bits_f, bits_b, total])
        if not HAS_STATES:
            weakest = gl.minimum(weakest, gl.min(gl.minimum(bits_f, bits_b), 1))
        bits_f = bits_f * LOG2E
        bits_b = bits_b * LOG2E
        # Where the gates were.
        k = s_k.index(slot).load(KEYS)
        s_kf.store(decayed(k, -bits_f))
        s_kb.store(decayed(k, -bits_b))
        fence_async_shared()
        q = s_q.index(stage).load(KEYS)
        q_f = gl.convert_layout(decayed(q, bits_f + bits), LEFT_TOKENS)
        q_b_ = gl.convert_layout(decayed(q, bits_b + bits), LEFT_TOKENS)
        s_v_ = s_v.index(slot)
        a_f = warpgroup_mma(q_f, s_kf.permute((1, 0)), nothing, use_acc=False, is_async=True)
        o = warpgroup_mma(
            q_b_, s_sb.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        o = warpgroup_mma(q_f, s_state.permute((1, 0)), o, is_async=True)
        s_f = warpgroup_mma(s_v_.permute((1, 0)), s_kf, s_f, is_async=True)
        a_f, o, s_f = warpgroup_mma_wait(0, deps=[a_f, o, s_f])
        s_f = held(s_f * gl.exp2(total * LOG2E))
        i = gl.arange(0, C, layout=gl.SliceLayout(1, TOKENS))[:, None]
        j = gl.arange(0, C, layout=gl.SliceLayout(0, TOKENS))[None, :] + z
        a_f = held_pairs(gl.where(i >= j, a_f, masked).to(gl.bfloat16))
        a_b = warpgroup_mma(q_b_, s_kb.permute((1, 0)), nothing, use_acc=False, is_async=True)
        a_b = warpgroup_mma_wait(0, deps=[a_b])
        a = a_f + gl.where(i <= j, a_b, masked).to(gl.bfloat16)
        a = gl.convert_layout(a, LEFT_TOKENS)
        o = warpgroup_mma(a, s_v_, o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        p = p_o + (i_c * C + z).to(gl.int64) * (H * V)
        write_rows(o.to(gl.bfloat16), s_v_, p, H * V, n - i_c * C, V, z)
    if not HAS_STATES:
        gl.store(p_weakest + segment, gl.min(weakest, 0) * LOG2E)


@lru_cache(maxsize=1024)
def segments(n_chunks: int, heads: int, processors: int) -> int:
    """Segments of so many chunks a head; one, if the sequence is held.

    The fewest rounds of the shortest programs. Segments have three chunks at least, or two where
    that makes eight at most.
    """
    if n_chunks == 1 or (n_chunks <= HELD and heads >= 2 * processors):
        return 1
    places = RESIDENT * processors
    most = max(2, n_chunks // 3, min(8, n_chunks // 2))
    numbers = {max(2, min(most, rounds * places // heads)) for rounds in range(1, ROUNDS + 1)}

    def cost(number: int) -> int:
        return duration(heads * number, places, ceil_div(n_chunks, number), OVERHEAD)

    return min(sorted(numbers), key=cost)


def forward_in_gluon(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float,
    chunks: int | None = None,
) -> Tensor:  # fmt: skip
    """Launches the forward.

    Args:
        q, k, v, gf, gb: As in `bidirectional_gla`; bfloat16, key dim 32, value dim 64, rows aligned
            to 16 bytes and contiguous.
        scale: Factor of q, positive.
        chunks: Chunks of a segment, at most; as many as suit the device where None. A sequence
            that is not held has two segments at least.
    """
    b, n, h, dk = q.shape
    dv = v.shape[-1]
    heads, n_chunks = b * h, ceil_div(n, CHUNK)
    if chunks is None:
        n_segments = segments(n_chunks, heads, multiprocessors(q.device))
    else:
        n_segments = ceil_div(n_chunks, chunks)
    if n_chunks > HELD:
        n_segments = max(2, n_segments)
    several = n_segments > 1
    sizes = (n, h, n_segments, n_chunks)
    inputs = (q, k, v, gf, gb)
    o = torch.empty(b, n, h, dv, dtype=q.dtype, device=q.device)
    right = q.new_empty(heads, n_segments if several else 0, dv, dk)
    stack = q.new_empty(heads, n_chunks, dv, dk)
    reach = q.new_empty(heads, n_chunks if several else 0, dk, dtype=torch.float32)
    weakest = q.new_empty(heads, n_segments, dtype=torch.float32)
    table = triangles(CHUNK, q.device)
    if several:
        added = q.new_empty(2, heads, n_segments, dv, dk)
        decays = q.new_empty(2, heads, n_segments, dk, dtype=torch.float32)
        adds_kernel[(heads * n_segments,)](
            k, v, gf, gb, added, decays, stack, reach, weakest, table[3], *strides(k, v, gf, gb),
            *sizes, **LAUNCH,
        )  # fmt: skip
        scan_kernel[ceil_div(dk * dv, 128), 2, heads](
            added, decays, right, stack, n_segments, n_chunks, heads, dk, dv, BLOCK=128,
            STAGES=8, num_warps=1,
        )  # fmt: skip
    bits = math.log2(0.5 * scale)
    out_kernel[(heads * n_segments,)](
        *inputs, o, right, stack, reach, weakest, table, bits, *strides(*inputs), *sizes,
        HAS_STATES=several, **(LAUNCH if several else HELD_LAUNCH),
    )  # fmt: skip
    p = make_plan(q, v)
    launch_exact(
        inputs, (o, right, stack, weakest), bits, sizes, 1, K=dk, V=dv, BK=dk, BV=dv, C=CHUNK,
        OP=p.op, PRECISION=p.precision, HAS_STATES=several, **p.exact,
    )  # fmt: skip
    return o
