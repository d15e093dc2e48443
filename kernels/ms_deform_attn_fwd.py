"""Forward of `ms_deform_attn` in Triton: kernel and launcher, and what the backward shares.

Notation: x, y are pixel coordinates in a level's map, integers at pixel centres; a sample is one
point of one level for one (query, head); its corners are the four pixels around it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.launch import await_previous, kernel


@triton.jit
def load_level(p_shapes, p_starts, level, S):
    """Height, width and first token of a level (or of each of a tensor of levels), int32.

    A level that reaches beyond the S tokens counts as empty: nothing outside `value` is touched.
    """
    height = tl.load(p_shapes + 2 * level).to(tl.int32)
    width = tl.load(p_shapes + 2 * level + 1).to(tl.int32)
    start = tl.load(p_starts + level).to(tl.int32)
    fits = (start >= 0) & (height > 0) & (width > 0) & (start + height * width <= S)
    return tl.where(fits, height, 0), tl.where(fits, width, 0), tl.where(fits, start, 0)


@triton.jit
def load_location(p_locations, sample, mask):
    """Loads (x, y) of samples with one load each: two floats as one integer of twice the size."""
    dtype: tl.constexpr = p_locations.dtype.element_ty
    if dtype == tl.float32:
        pair = tl.load(p_locations.to(tl.pointer_type(tl.int64)) + sample, mask=mask, other=0)
        x = (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        y = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        pair = tl.load(p_locations.to(tl.pointer_type(tl.int32)) + sample, mask=mask, other=0)
        x = (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        y = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return x, y


@triton.jit
def store_location(p_locations, sample, x, y, mask):
    """Stores what `load_location` loads, likewise with one store each."""
    dtype: tl.constexpr = p_locations.dtype.element_ty
    if dtype == tl.float32:
        low = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        pair = (y.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
        tl.store(p_locations.to(tl.pointer_type(tl.int64)) + sample, pair, mask=mask)
    else:
        low = x.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pair = (y.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
        tl.store(p_locations.to(tl.pointer_type(tl.int32)) + sample, pair, mask=mask)


@triton.jit
def to_pixels(x, y, mask, height, width):
    """Locations from 0 to 1 as pixel coordinates, and whether a corner can lie in the map.

    Where none does (or the location is not finite) the coordinates are 0.
    """
    x = x * width - 0.5
    y = y * height - 0.5
    near = mask & (x >= -1) & (x < width) & (y >= -1) & (y < height)
    near &= (width > 0) & (height > 0)
    return tl.where(near, x, 0.0), tl.where(near, y, 0.0), near


@triton.jit
def load_corners(p_map, x, y, near, height, width, stride, cols, mask_cols):
    """The four corners of each sample, (samples, channels) in the map's dtype, 0 outside the map.

    In the order top left, top right, bottom left, bottom right; then the samples' distances from
    the top left one, float32.
    """
    left = tl.floor(x)
    top = tl.floor(y)
    column = left.to(tl.int32)
    row = top.to(tl.int32)
    p = p_map + ((row * width + column).to(tl.int64) * stride)[:, None] + cols[None, :]
    below = width.to(tl.int64) * stride
    in_0 = near & (column >= 0)
    in_1 = near & (column + 1 < width)
    in_top = row >= 0
    in_bottom = row + 1 < height
    v00 = tl.load(p, mask=(in_0 & in_top)[:, None] & mask_cols, other=0.0)
    v01 = tl.load(p + stride, mask=(in_1 & in_top)[:, None] & mask_cols, other=0.0)
    v10 = tl.load(p + below, mask=(in_0 & in_bottom)[:, None] & mask_cols, other=0.0)
    v11 = tl.load(p + below + stride, mask=(in_1 & in_bottom)[:, None] & mask_cols, other=0.0)
    return v00, v01, v10, v11, x - left, y - top


@kernel(sizes=['S', 'Q', 'H', 'n_blocks'])
def ms_deform_attn_kernel(
    p_value, p_shapes, p_starts, p_locations, p_weights, p_out,
    v_b, v_s, v_h, S, Q, H, n_blocks,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """out[q] = sum over levels and points of weight * bilinear sample of the head's map.

    value (B, S, H, D), last dim contiguous; shapes (L, 2) and starts (L,) integers; locations
    (B, Q, H, L, P, 2), weights (B, Q, H, L, P), out (B, Q, H, D) contiguous. A program sums BQ
    queries of one head in float32; UNROLL divides P. Programs of a head follow each other, so that
    those at work together read the same few maps, which then stay in the L2 cache.
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
    p_value += b * v_b + h.to(tl.int64) * v_h
    out = tl.zeros((BQ, BD), tl.float32)
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
            w_top = w * (1 - dy)
            w_bottom = w * dy
            out += (w_top * (1 - dx))[:, None] * v00.to(tl.float32)
            out += (w_top * dx)[:, None] * v01.to(tl.float32)
            out += (w_bottom * (1 - dx))[:, None] * v10.to(tl.float32)
            out += (w_bottom * dx)[:, None] * v11.to(tl.float32)
    tl.store(
        p_out + rows[:, None] * D + cols[None, :],
        out.to(p_out.dtype.element_ty),
        mask=mask[:, None] & mask_cols,
    )


def unroll(points: int) -> int:
    """How many points of a level a kernel's loop takes at once."""
    return next(n for n in (4, 3, 2, 1) if points % n == 0)


def pairs(locations: Tensor) -> Tensor:
    """Locations as `load_location` needs them: contiguous, every pair aligned to its size."""
    locations = locations.contiguous()
    aligned = locations.data_ptr() % (2 * locations.element_size()) == 0
    return locations if aligned else locations.clone()


def unit_stride(x: Tensor) -> Tensor:
    """The tensor with a contiguous last dim, copied only where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_sizes(head_dim: int, element_size: int) -> dict[str, int]:
    """Blocks of channels and queries for which one warp loads a corner with 16 bytes a lane.

    Measured on an H200 from 1 to 8 warps a program: one is the fastest or within 3% of it, since
    nothing but memory makes it wait, and reductions over channels need no barrier.
    """
    block_d = power_of_2(head_dim)
    return dict(BD=block_d, BQ=max(1, 32 * 16 // (block_d * element_size)), num_warps=1)


def forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Launches the forward; tensors as in `reference.ms_deform_attn`, none of them empty."""
    b, s, h, d = value.shape
    q, n_levels, n_points = locations.shape[1], *locations.shape[3:5]
    value = unit_stride(value)
    out = torch.empty(b, q, h * d, dtype=value.dtype, device=value.device)
    blocks = block_sizes(d, value.element_size())
    n_blocks = ceil_div(q, blocks['BQ'])
    ms_deform_attn_kernel[(n_blocks * b * h,)](
        value, shapes.contiguous(), starts.contiguous(), pairs(locations), weights.contiguous(),
        out, *value.stride()[:3], s, q, h, n_blocks,
        L=n_levels, P=n_points, D=d, UNROLL=unroll(n_points), **blocks,
    )  # fmt: skip
    return out
