"""Backward of `ms_deform_attn` in Triton: gradients to locations and weights, and launcher.

The gradient to `value` is in `ms_deform_attn_bins.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div
from mmvig.kernels.launch import await_previous, kernel
from mmvig.kernels.ms_deform_attn_bins import value_gradient
from mmvig.kernels.ms_deform_attn_fwd import (
    block_sizes,
    load_corners,
    load_level,
    load_location,
    pairs,
    store_location,
    to_pixels,
    unit_stride,
    unroll,
)


@triton.jit
def row_dot(do, corner):
    """Dot product of each row of do with the corner's channels."""
    return tl.sum(do * corner.to(tl.float32), 1)


@kernel(sizes=['S', 'Q', 'H', 'n_blocks'])
def points_kernel(
    p_value, p_shapes, p_starts, p_locations, p_weights, p_do, p_dlocations, p_dweights,
    v_b, v_s, v_h, S, Q, H, n_blocks,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """dweight = do . sample; dlocation = weight * d(do . sample) / d(x, y) * (width, height).

    Tensors and programs as in `ms_deform_attn_kernel`, do (B, Q, H, D) contiguous; products and
    sums in float32. The four products do . corner give all three numbers of a sample.
    """
    await_previous()
    head = tl.program_id(0) // n_blocks
    b = (head // H).to(tl.int64)
    h = head % H
    queries = tl.program_id(0) % n_blocks * BQ + tl.arange(0, BQ)
    mask = queries < Q
    cols = tl.arange(0, BD)
    mask_cols = (cols < D)[None, :]
    rows = (b * Q + queries) * H + h
    do = tl.load(
        p_do + rows[:, None] * D + cols[None, :], mask=mask[:, None] & mask_cols, other=0.0
    ).to(tl.float32)
    p_value += b * v_b + h.to(tl.int64) * v_h
    for i in range(0, L * P, UNROLL):
        height, width, start = load_level(p_shapes, p_starts, i // P, S)
        p_map = p_value + start.to(tl.int64) * v_s
        for u in tl.static_range(UNROLL):
            sample = rows * (L * P) + i + u
            x, y = load_location(p_locations, sample, mask)
            w = tl.load(p_weights + sample, mask=mask, other=0.0).to(tl.float32)
            x, y, near = to_pixels(x, y, mask, height, width)
            v00, v01, v10, v11, dx, dy = load_corners(
                p_map, x, y, near, height, width, v_s, cols, mask_cols
            )
            d00 = row_dot(do, v00)
            d01 = row_dot(do, v01)
            d10 = row_dot(do, v10)
            d11 = row_dot(do, v11)
            along_top = d01 - d00
            along_bottom = d11 - d10
            top = d00 + dx * along_top
            bottom = d10 + dx * along_bottom
            grad_x = w * width * (along_top + dy * (along_bottom - along_top))
            grad_y = w * height * (bottom - top)
            grad_w = top + dy * (bottom - top)
            store_location(p_dlocations, sample, grad_x, grad_y, mask)
            tl.store(p_dweights + sample, grad_w.to(p_dweights.dtype.element_ty), mask=mask)


def point_gradients(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, do: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to locations and weights, contiguous, in their dtypes; see `value_gradient`."""
    b, s, h, d = value.shape
    q, n_levels, n_points = locations.shape[1], *locations.shape[3:5]
    dlocations, dweights = torch.empty_like(locations), torch.empty_like(weights)
    blocks = block_sizes(d, value.element_size())
    n_blocks = ceil_div(q, blocks['BQ'])
    points_kernel[(n_blocks * b * h,)](
        value, shapes, starts, locations, weights, do, dlocations, dweights,
        *value.stride()[:3], s, q, h, n_blocks,
        L=n_levels, P=n_points, D=d, UNROLL=unroll(n_points), **blocks,
    )  # fmt: skip
    return dlocations, dweights


def backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    do: Tensor,
    needs_value: bool = True,
    needs_points: bool = True,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward: gradients to value, locations and weights; what is not needed, empty.

    Args:
        do: (B, Q, H * D), the output's gradient, in the dtype of value.
        deterministic: Whether repeated calls must agree to the last bit.
    """
    args = [
        unit_stride(value),
        *(x.contiguous() for x in (shapes, starts)),
        pairs(locations),
        *(x.contiguous() for x in (weights, do)),
    ]
    dvalue = value_gradient(*args, deterministic) if needs_value else value.new_empty(0)
    if not needs_points:
        return dvalue, locations.new_empty(0), weights.new_empty(0)
    return dvalue, *point_gradients(*args)
