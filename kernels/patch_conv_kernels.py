"""Triton kernel and launcher of `patch_conv`: the windows as rows of a matrix."""

import torch
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.launch import await_previous, kernel

BM, MAX_BK, WARPS = 16, 256, 4


@kernel(sizes=['R', 'H', 'W', 'OH', 'OW'])
def patch_windows_kernel(
    p_x, p_out, R, H, W, OH, OW, S, PAD, K,
    CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Row r of out, (R, K), are the CIN x KH x KW numbers under window r, then zeros.

    x is (B, H, W, CIN), contiguous. A program does BM windows and BK of their numbers.
    """
    await_previous()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    channel = cols // (KH * KW)
    b = rows // (OH * OW)
    y = (rows // OW % OH * S - PAD)[:, None] + (cols // KW % KH)[None, :]
    x = (rows % OW * S - PAD)[:, None] + (cols % KW)[None, :]
    mask = (rows < R)[:, None] & (channel < CIN)[None, :]
    mask &= (y >= 0) & (y < H) & (x >= 0) & (x < W)
    at = b.to(tl.int64)[:, None] * (H * W * CIN) + (y * W + x) * CIN + channel[None, :]
    b_out = tl.load(p_x + at, mask=mask, other=0.0)
    at = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(p_out + at, b_out, mask=(rows < R)[:, None] & (cols < K)[None, :])


def gather(
    x: Tensor, kernel_size: tuple[int, int], stride: int, padding: int, width: int
) -> Tensor:
    """x (B, H, W, CIN), contiguous, to rows (B, OH, OW, width)."""
    b, h, w, cin = x.shape
    oh, ow = ((n + 2 * padding - k) // stride + 1 for n, k in zip((h, w), kernel_size, strict=True))
    out = torch.empty(b, oh, ow, width, dtype=x.dtype, device=x.device)
    block = min(MAX_BK, power_of_2(width))
    patch_windows_kernel[(ceil_div(b * oh * ow, BM), ceil_div(width, block))](
        x, out, b * oh * ow, h, w, oh, ow, stride, padding, width,
        CIN=cin, KH=kernel_size[0], KW=kernel_size[1], BM=BM, BK=block, num_warps=WARPS,
    )  # fmt: skip
    return out
