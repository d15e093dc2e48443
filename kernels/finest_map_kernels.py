"""Triton kernel and launcher of `finest_map`: the forward alone."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from mmvig.kernels.batch_norm_kernels import load_norm
from mmvig.kernels.grid import ceil_div, num_programs, power_of_2
from mmvig.kernels.launch import await_previous, kernel
from mmvig.kernels.resized_sum_kernels import load_resized

BC = 64  # channels a program
PIXELS, WARPS = 32, 4
RESIDENT = 6  # programs a multiprocessor, of which each takes several tiles of pixels


@kernel(sizes=['tiles', 'B', 'H', 'W', 'h', 'w'])
def finest_map_kernel(
    p_x, p_y, p_project, p_tokens, p_bias, p_mean, p_var, p_weight, p_shift, p_out,
    y_b, t_b, blocks, tiles, B, H, W, h, w, C, CY, eps,
    UP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = batch norm of x + y @ project^T + bias + resize(tokens).

    x (B, H / 2, W / 2, 2, 2, C), contiguous: rows of four pixels; y (B, H, W, CY), project (C, CY),
    tokens (B, h, w, C), out (B, H, W, C). A program does BC channels of each so many-th tile of BM
    pixels, of `tiles` an image; those of other channels of the same pixels come next.
    """
    await_previous()
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    mask_c = cols < C
    k = tl.arange(0, BK)
    mask_k = k < CY
    at = cols[None, :] * CY + k[:, None]
    b_project = tl.load(p_project + at, mask=mask_c[None, :] & mask_k[:, None], other=0.0)
    b_mean, b_rstd, b_scale, b_shift = load_norm(
        p_mean, p_var, p_weight, p_shift, cols, mask_c, eps
    )
    b_scale *= b_rstd
    b_shift += (tl.load(p_bias + cols, mask=mask_c, other=0.0).to(tl.float32) - b_mean) * b_scale
    step = tl.num_programs(0) // blocks
    # with two stages, tiles in shared memory leave room for half the programs: twice the time
    for tile in tl.range(tl.program_id(0) // blocks, B * tiles, step, num_stages=1):
        b = (tile // tiles).to(tl.int64)
        rows = tile % tiles * BM + tl.arange(0, BM)
        mask_r = rows < H * W
        mask = mask_r[:, None] & mask_c[None, :]
        of_y = rows.to(tl.int64)[:, None] * CY + k[None, :]
        b_y = tl.load(p_y + b * y_b + of_y, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        y = rows // W
        x = rows % W
        quarter = (y // 2 * (W // 2) + x // 2) * 4 + y % 2 * 2 + x % 2
        of_x = b * H * W * C + quarter.to(tl.int64)[:, None] * C + cols[None, :]
        b_x = tl.load(p_x + of_x, mask=mask, other=0.0)
        b_out = load_resized(p_tokens + b * t_b, y, x, h, w, C, cols, mask, UP, 1)
        b_out += b_x.to(tl.float32)
        b_out += tl.dot(b_y, b_project, input_precision=PRECISION)
        b_out = b_out * b_scale + b_shift
        of_out = b * H * W * C + rows.to(tl.int64)[:, None] * C + cols[None, :]
        tl.store(p_out + of_out, b_out.to(p_out.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    y: Tensor,
    project: Tensor,
    tokens: Tensor,
    bias: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    ratio: int,
) -> Tensor:
    """x (B, H / 2, W / 2, 4 C), y (B, H, W, CY) and tokens (B, h, w, C) to (B, H, W, C).

    x and project are contiguous, pixels of y and tokens contiguous in an image; ratio is H / h.
    """
    b, height, width, cy = y.shape
    c = project.shape[0]
    out = torch.empty(b, height, width, c, dtype=x.dtype, device=x.device)
    channels = max(16, min(BC, power_of_2(c)))
    blocks, tiles = ceil_div(c, channels), ceil_div(height * width, PIXELS)
    programs = num_programs(b * tiles, x.device, max(1, RESIDENT // blocks))
    finest_map_kernel[(programs * blocks,)](
        x, y, project, tokens, bias, *norm, out, y.stride(0), tokens.stride(0),
        blocks, tiles, b, height, width, *tokens.shape[1:3], c, cy, eps,
        UP=ratio, BM=PIXELS, BC=channels, BK=max(16, power_of_2(cy)),
        PRECISION='ieee' if x.dtype == torch.float32 else 'tf32', num_warps=WARPS,
    )  # fmt: skip
    return out
