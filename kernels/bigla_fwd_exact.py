"""Forward of `bidirectional_gla` for the segments that are too strong for the form from the edges.

Notation: `bigla_tiles.py`; the form itself: `exact_scores`.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.bigla_fwd_looped import exact_scores
from mmvig.kernels.bigla_fwd_tiles import get, get_state, offset, put, put_state
from mmvig.kernels.bigla_tiles import half_gates, scan_gates, segment_chunks, strides
from mmvig.kernels.grid import ceil_div, multiprocessors, power_of_2
from mmvig.kernels.launch import await_previous, kernel

# Segments with a chunk that decays by more bits take the exact form.
MAX_BITS = tl.constexpr(80.0)
MAX_GROUP = 8  # segments that a program looks at


@triton.jit
def exact_segment(
    slot, p_q, p_k, p_v, p_gf, p_gb, p_o, p_right, p_stack, bits,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    N, H, n_segments, n_chunks, v0,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr,
):  # fmt: skip
    """What `out_kernel` does, for a segment that is too strong for it."""
    head = slot // n_segments
    i_s = slot % n_segments
    b = head // H
    h = head % H
    first, size = segment_chunks(i_s, n_segments, n_chunks)
    t = first * C
    n = N - t
    mask_k: tl.constexpr = BK != K
    mask_v: tl.constexpr = V % BV != 0
    p_q += offset(b, q_b) + offset(t, q_n) + offset(h, q_h)
    p_k += offset(b, k_b) + offset(t, k_n) + offset(h, k_h)
    p_v += offset(b, v_b) + offset(t, v_n) + offset(h, v_h) + v0
    p_gf += offset(b, gf_b) + offset(t, gf_n) + offset(h, gf_h)
    p_gb += offset(b, gb_b) + offset(t, gb_n) + offset(h, gb_h)
    p_o += ((offset(b, N) + t) * H + h) * V + v0
    p_stack += (offset(head, n_chunks) + first) * (K * V)
    if HAS_STATES:
        s_f = get_state(p_right + offset(slot, K * V), K, V, v0, 0, BV, BK).to(tl.float32)
        s_b = get_state(p_stack + (size - 1) * (K * V), K, V, v0, 0, BV, BK).to(tl.float32)
    else:
        s_f = tl.zeros((BV, BK), tl.float32)
        s_b = tl.zeros((BV, BK), tl.float32)
    for step in range(size - 1):
        i_c = size - 1 - step
        t = i_c * C
        gb = get(p_gb + offset(t, gb_n), gb_n, n - t, K, 0, C, BK, mask_k)
        k = get(p_k + offset(t, k_n), k_n, n - t, K, 0, C, BK, mask_k).to(tl.float32)
        v = get(p_v + offset(t, v_n), v_n, n - t, V - v0, 0, C, BV, mask_v).to(OP)
        k = (k * tl.exp2(scan_gates(gb, False, True))).to(OP)
        s_b *= tl.exp2(2.0 * half_gates(gb, C, BV))
        s_b = tl.dot(tl.trans(v), k, s_b, input_precision=PRECISION)
        put_state(p_stack + (i_c - 1) * (K * V), s_b, K, V, v0, 0, BV, BK)
    tl.debug_barrier()
    for i_c in range(size):
        t = i_c * C
        left = n - t
        q = get(p_q + offset(t, q_n), q_n, left, K, 0, C, BK, mask_k).to(tl.float32)
        k = get(p_k + offset(t, k_n), k_n, left, K, 0, C, BK, mask_k).to(tl.float32)
        v = get(p_v + offset(t, v_n), v_n, left, V - v0, 0, C, BV, mask_v).to(OP)
        gf = get(p_gf + offset(t, gf_n), gf_n, left, K, 0, C, BK, mask_k)
        gb = get(p_gb + offset(t, gb_n), gb_n, left, K, 0, C, BK, mask_k)
        s_b_in = get_state(p_stack + i_c * (K * V), K, V, v0, 0, BV, BK)
        p_kt = p_k + offset(t, k_n)
        a = tl.zeros((C, C), tl.float32)
        a = exact_scores(a, q, p_kt, p_gf + offset(t, gf_n), k_n, gf_n, left, K, C, BK, False)
        a = exact_scores(a, q, p_kt, p_gb + offset(t, gb_n), k_n, gb_n, left, K, C, BK, True)
        o = tl.dot(a.to(OP), v, input_precision=PRECISION)
        q_f = (q * tl.exp2(scan_gates(gf, False, False))).to(OP)
        o = tl.dot(q_f, tl.trans(s_f.to(OP)), o, input_precision=PRECISION)
        q_b_ = (q * tl.exp2(scan_gates(gb, True, False))).to(OP)
        o = tl.dot(q_b_, tl.trans(s_b_in), o, input_precision=PRECISION)
        o *= tl.exp2(bits)
        put(p_o + offset(t, H * V), o, H * V, left, V - v0, 0, C, BV, mask_v)
        k = (k * tl.exp2(scan_gates(gf, True, True))).to(OP)
        s_f *= tl.exp2(2.0 * half_gates(gf, C, BV))
        s_f = tl.dot(tl.trans(v), k, s_f, input_precision=PRECISION)


@kernel(sizes=['N', 'H', 'n_slots', 'n_segments', 'n_chunks'])
def exact_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_o, p_right, p_stack, p_weakest, bits,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
    n_slots, N, H, n_segments, n_chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, HAS_STATES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As `out_kernel`, for the segments that are too strong for it.

    Program: (GROUP slots, each a segment of a head; V block). Without such a segment it returns at
    once; a program for each of thousands would take several microseconds for that.
    """
    await_previous()
    start = tl.program_id(0) * GROUP
    slots = start + tl.arange(0, GROUP)
    if tl.min(tl.load(p_weakest + slots, mask=slots < n_slots, other=0.0)) > -MAX_BITS:
        return
    for i in range(GROUP):
        slot = start + i
        if tl.load(p_weakest + slot, mask=slot < n_slots, other=0.0) <= -MAX_BITS:
            exact_segment(
                slot, p_q, p_k, p_v, p_gf, p_gb, p_o, p_right, p_stack, bits,
                q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h,
                N, H, n_segments, n_chunks, tl.program_id(1) * BV,
                K, V, BK, BV, C, OP, PRECISION, HAS_STATES,
            )  # fmt: skip


def launch_exact(
    inputs: Sequence[Tensor], others: Sequence[Tensor], bits: float, sizes: Sequence[int],
    blocks: int, **settings: Any,
) -> None:  # fmt: skip
    """Launches `exact_kernel`.

    Args:
        inputs: q, k, v and both gates.
        others: The output, what enters each segment from the left, the stack, strongest decays.
        bits: Binary logarithm of half the scale.
        sizes: N, H, segments and chunks of a sequence.
        blocks: Of value channels.
        settings: The kernel's constants and launch options.
    """
    n_slots = others[-1].numel()
    share = n_slots // (2 * multiprocessors(inputs[0].device))
    group = max(1, min(MAX_GROUP, power_of_2(share + 1) // 2))
    exact_kernel[ceil_div(n_slots, group), blocks](
        *inputs, *others, bits, *strides(*inputs), n_slots, *sizes, **settings, GROUP=group
    )
