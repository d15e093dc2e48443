"""Triton kernel and launcher of `finest_map`: the forward alone."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.batch_norm_kernels import load_norm
from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.resized_sum_kernels import load_resized

BC = 64  # channels a program
PIXELS = 32


@triton.jit
def finest_map_kernel(
    p_x, p_y, p_project, p_tokens, p_bias, p_mean, p_var, p_weight, p_shift, p_out,
    y_b, t_b, blocks, H, W, h, w, C, CY, eps,
    UP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = batch norm of x + y @ project^T + bias + resize(tokens).

    x (B, H / 2, W / 2, 2, 2, C), contiguous: rows of four pixels; y (B, H, W, CY), project (C, CY),
    tokens (B, h, w, C), out (B, H, W, C). A program does BM pixels of an image and BC channels.
    """
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    b = tl.program_id(1).to(tl.int64)
    mask_c = cols < C
    mask_r = rows < H * W
    mask = mask_r[:, None] & mask_c[None, :]
    k = tl.arange(0, BK)
    at = rows.to(tl.int64)[:, None] * CY + k[None, :]
    b_y = tl.load(p_y + b * y_b + at, mask=mask_r[:, None] & (k < CY)[None, :], other=0.0)
    at = cols[None, :] * CY + k[:, None]
    b_project = tl.load(p_project + at, mask=mask_c[None, :] & (k < CY)[:, None], other=0.0)
    b_out = tl.dot(b_y, b_project, input_precision=PRECISION)
    y = rows // W
    x = rows % W
    quarter = (y // 2 * (W // 2) + x // 2) * 4 + y % 2 * 2 + x % 2
    at = b * H * W * C + quarter.to(tl.int64)[:, None] * C + cols[None, :]
    b_out += tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    b_out += load_resized(p_tokens + b * t_b, y, x, h, w, C, cols, mask, UP, 1)
    b_out += tl.load(p_bias + cols, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    b_mean, b_rstd, b_scale, b_shift = load_norm(
        p_mean, p_var, p_weight, p_shift, cols, mask_c, eps
    )
    b_out = (b_out - b_mean) * (b_rstd * b_scale) + b_shift
    at = b * H * W * C + rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)


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
    blocks = ceil_div(c, channels)
    finest_map_kernel[(ceil_div(height * width, PIXELS) * blocks, b)](
        x, y, project, tokens, bias, *norm, out, y.stride(0), tokens.stride(0),
        blocks, height, width, *tokens.shape[1:3], c, cy, eps,
        UP=ratio, BM=PIXELS, BC=channels, BK=max(16, power_of_2(cy)),
        PRECISION='ieee' if x.dtype == torch.float32 else 'tf32',
    )  # fmt: skip
    return out
