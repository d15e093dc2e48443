"""Triton kernels and launchers of `sampling_points`; float32 inside, rounded once at the store.

A row is one head of one query, its J = L * P samples lie side by side: offsets (M, H, J, 2) and
logits (M, H, J), M = B * Q queries, are column blocks of a wider matrix.
"""

import torch
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.launch import await_previous, kernel

TILE = 1024  # samples a program


@kernel(sizes=['R', 'Q'])
def sampling_points_kernel(
    p_offsets, p_logits, p_centers, p_pixel, p_locations, p_weights, R, Q, H, o_m, l_m,
    P: tl.constexpr, J: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """locations = center of the query + offset * pixel of the level, weights = softmax(logits).

    Centers (Q, 2) and pixels (L, 2), locations (R, J, 2), weights (R, J). A program does BR rows.
    """
    await_previous()
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    mask_r = (rows < R)[:, None]
    m = (rows // H).to(tl.int64)
    h = rows % H
    cols = tl.arange(0, BJ)
    twice = tl.arange(0, 2 * BJ)
    mask = mask_r & (cols < J)[None, :]
    mask_2 = mask_r & (twice < 2 * J)[None, :]
    at = (m * l_m + h * J)[:, None] + cols[None, :]
    b_logits = tl.load(p_logits + at, mask=mask, other=float('-inf')).to(tl.float32)
    b_logits = tl.where(mask_r, b_logits, 0.0)
    b_weights = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
    b_weights /= tl.sum(b_weights, 1)[:, None]
    rows = rows.to(tl.int64)
    tl.store(p_weights + rows[:, None] * J + cols[None, :], b_weights, mask=mask)
    at = (m * o_m + 2 * h * J)[:, None] + twice[None, :]
    b_offsets = tl.load(p_offsets + at, mask=mask_2, other=0.0).to(tl.float32)
    level = twice // (2 * P)
    b_pixel = tl.load(p_pixel + 2 * level + twice % 2, mask=twice < 2 * J, other=0.0)
    at = (m % Q * 2)[:, None] + (twice % 2)[None, :]
    b_center = tl.load(p_centers + at, mask=mask_2, other=0.0)
    b_locations = b_center + b_offsets * b_pixel[None, :]
    tl.store(p_locations + rows[:, None] * (2 * J) + twice[None, :], b_locations, mask=mask_2)


@kernel(sizes=['R'])
def sampling_points_grad_kernel(
    p_weights, p_pixel, p_dlocations, p_dweights, p_doffsets, p_dlogits, R, H, d_m,
    P: tl.constexpr, J: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """doffset = dlocation * pixel, dlogit = w (dw - sum of w dw); both of rows d_m apart."""
    await_previous()
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    mask_r = (rows < R)[:, None]
    m = (rows // H).to(tl.int64)
    h = rows % H
    cols = tl.arange(0, BJ)
    twice = tl.arange(0, 2 * BJ)
    mask = mask_r & (cols < J)[None, :]
    mask_2 = mask_r & (twice < 2 * J)[None, :]
    at = rows.to(tl.int64)[:, None] * J + cols[None, :]
    b_weights = tl.load(p_weights + at, mask=mask, other=0.0)
    b_dweights = tl.load(p_dweights + at, mask=mask, other=0.0)
    b_dlogits = b_weights * (b_dweights - tl.sum(b_weights * b_dweights, 1)[:, None])
    at = (m * d_m + h * J)[:, None] + cols[None, :]
    tl.store(p_dlogits + at, b_dlogits.to(p_dlogits.dtype.element_ty), mask=mask)
    at = rows.to(tl.int64)[:, None] * (2 * J) + twice[None, :]
    b_dlocations = tl.load(p_dlocations + at, mask=mask_2, other=0.0)
    level = twice // (2 * P)
    b_pixel = tl.load(p_pixel + 2 * level + twice % 2, mask=twice < 2 * J, other=0.0)
    at = (m * d_m + 2 * h * J)[:, None] + twice[None, :]
    b_doffsets = (b_dlocations * b_pixel[None, :]).to(p_doffsets.dtype.element_ty)
    tl.store(p_doffsets + at, b_doffsets, mask=mask_2)


def _tile(j: int) -> dict[str, int]:
    block = power_of_2(j)
    return dict(J=j, BJ=block, BR=max(1, TILE // block))


def forward(
    offsets: Tensor, logits: Tensor, centers: Tensor, pixel: Tensor, heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P), float32.

    Args:
        offsets, logits: (B, Q, H * L * P * 2) and (B, Q, H * L * P), rows evenly spaced.
        centers, pixel: (Q, 2) and (L, 2), float32, contiguous.
        heads: H, L and P.
    """
    b, q = offsets.shape[:2]
    h, levels, points = heads
    weights = torch.empty(b, q, *heads, dtype=torch.float32, device=offsets.device)
    locations = torch.empty(b, q, *heads, 2, dtype=torch.float32, device=offsets.device)
    rows, tile = b * q * h, _tile(levels * points)
    sampling_points_kernel[(ceil_div(rows, tile['BR']),)](
        offsets, logits, centers, pixel, locations, weights, rows, q, h,
        offsets.stride(1), logits.stride(1), P=points, **tile,
    )  # fmt: skip
    return locations, weights


def backward(
    weights: Tensor, pixel: Tensor, dlocations: Tensor, dweights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients to offsets and logits in a dtype, side by side in one buffer; contiguous inputs."""
    b, q, h, levels, points = weights.shape
    wide = h * levels * points
    grads = torch.empty(b, q, 3 * wide, dtype=dtype, device=weights.device)
    doffsets, dlogits = grads.split([2 * wide, wide], -1)
    rows, tile = b * q * h, _tile(levels * points)
    sampling_points_grad_kernel[(ceil_div(rows, tile['BR']),)](
        weights, pixel, dlocations, dweights, doffsets, dlogits, rows, h, 3 * wide,
        P=points, **tile,
    )  # fmt: skip
    return doffsets, dlogits
