"""Triton kernel and launcher of `deform_attn_of_offsets`: the forward alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.ms_deform_attn_fwd import (
    add_sample,
    block_sizes,
    load_level,
    load_location,
    unit_stride,
    unroll,
)


@triton.jit(do_not_specialize=['S', 'Q', 'H', 'n_blocks'])
def deform_attn_of_offsets_kernel(
    p_value, p_shapes, p_starts, p_centers, p_pixel, p_offsets, p_logits, p_out,
    v_b, v_s, v_h, o_m, l_m, S, Q, H, n_blocks,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr,
    BJ: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`ms_deform_attn`'s forward with locations center + offset * pixel and softmax weights.

    value, shapes, starts, out and the order of programs as there; centers (Q, 2), pixel (L, 2).
    Offsets (B * Q, H, L, P, 2) have rows o_m pairs apart, logits (B * Q, H, L, P) rows l_m apart.
    """
    head = tl.program_id(0) // n_blocks
    b = (head // H).to(tl.int64)
    h = head % H
    queries = tl.program_id(0) % n_blocks * BQ + tl.arange(0, BQ)
    mask = queries < Q
    queries = tl.minimum(queries, Q - 1)
    cols = tl.arange(0, BD)
    mask_cols = (cols < D)[None, :]
    rows = b * Q + queries
    p_value += b * v_b + h.to(tl.int64) * v_h
    p_logits += rows * l_m + h * (L * P)
    j = tl.arange(0, BJ)
    b_logits = tl.load(
        p_logits[:, None] + j[None, :], mask=(j < L * P)[None, :], other=-float('inf')
    )
    b_logits = b_logits.to(tl.float32)
    b_max = tl.max(b_logits, 1)
    b_share = 1 / tl.sum(tl.exp(b_logits - b_max[:, None]), 1)
    center_x, center_y = load_location(p_centers, queries, mask)
    out = tl.zeros((BQ, BD), tl.float32)
    for i in range(0, L * P, UNROLL):
        level = i // P
        height, width, start = load_level(p_shapes, p_starts, level, S)
        pixel_x = tl.load(p_pixel + 2 * level)
        pixel_y = tl.load(p_pixel + 2 * level + 1)
        p_map = p_value + start.to(tl.int64) * v_s
        for u in tl.static_range(UNROLL):
            x, y = load_location(p_offsets, rows * o_m + h * (L * P) + i + u, mask)
            w = tl.exp(tl.load(p_logits + i + u).to(tl.float32) - b_max) * b_share
            x = center_x + x * pixel_x
            y = center_y + y * pixel_y
            out = add_sample(out, p_map, x, y, w, mask, height, width, v_s, cols, mask_cols)
    tl.store(
        p_out + (rows * H + h)[:, None] * D + cols[None, :],
        out.to(p_out.dtype.element_ty),
        mask=mask[:, None] & mask_cols,
    )


def takes(offsets: Tensor, logits: Tensor) -> bool:
    """Whether rows are evenly spaced over the batch, and every offset's (x, y) one aligned load."""
    even = all(
        x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) for x in (offsets, logits)
    )
    pairs = offsets.data_ptr() % (2 * offsets.element_size()) == 0 and offsets.stride(1) % 2 == 0
    return even and pairs


def forward(
    value: Tensor,
    levels: tuple[Tensor, Tensor],
    offsets: Tensor,
    logits: Tensor,
    table: tuple[Tensor, Tensor],
    heads: tuple[int, int, int],
) -> Tensor:
    """Arguments as of `reference.deform_attn_of_offsets`, such as `takes` wants, none empty."""
    b, s, h, d = value.shape
    q, (_, n_levels, n_points) = offsets.shape[1], heads
    value = unit_stride(value)
    out = torch.empty(b, q, h * d, dtype=value.dtype, device=value.device)
    blocks = block_sizes(d, value.element_size())
    n_blocks = ceil_div(q, blocks['BQ'])
    deform_attn_of_offsets_kernel[(n_blocks * b * h,)](
        value, *(t.contiguous() for t in levels), *(t.contiguous() for t in table), offsets, logits,
        out, *value.stride()[:3], offsets.stride(1) // 2, logits.stride(1), s, q, h, n_blocks,
        L=n_levels, P=n_points, D=d, BJ=power_of_2(n_levels * n_points), UNROLL=unroll(n_points),
        **blocks,
    )  # fmt: skip
    return out
