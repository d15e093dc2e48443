"""Triton kernel and launcher of `stem_conv`: the forward, as one matrix product a program."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from mmvig.kernels.batch_norm_kernels import load_norm
from mmvig.kernels.grid import ceil_div, num_programs, power_of_2
from mmvig.kernels.launch import await_previous, kernel

MAX_K = 32  # numbers in a window, 9 times the input channels
BM, MAX_BC, WARPS = 64, 64, 4
RESIDENT = 4  # programs a multiprocessor, of which each takes several tiles of pixels


@kernel(sizes=['tiles', 'B', 'H', 'W', 'OH', 'OW'])
def stem_conv_kernel(
    p_x, p_weight, p_mean, p_var, p_scale, p_shift, p_out, tiles, B, H, W, OH, OW, C, eps,
    CIN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    HAS_NORM: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = conv(x), batch norm of it if HAS_NORM, and ReLU; float32 inside, rounded at the store.

    x (B, H, W, CIN), weight (C, CIN, 3, 3), out (B, OH, OW, C), contiguous. A program does BC
    channels of each so many-th tile of BM pixels, of `tiles` an image: it gathers their windows,
    BK >= 9 CIN numbers each, and multiplies them with the weights, both in the dtype of x.
    """
    await_previous()
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    mask_c = cols < C
    k = tl.arange(0, BK)
    ky = k // (3 * CIN)
    kx = k // CIN % 3
    channel = k % CIN
    mask_k = k < 9 * CIN
    at_weight = cols[None, :] * (9 * CIN) + (channel * 9 + ky * 3 + kx)[:, None]
    b_weight = tl.load(p_weight + at_weight, mask=mask_c[None, :] & mask_k[:, None], other=0.0)
    b_weight = b_weight.to(p_x.dtype.element_ty)
    if HAS_NORM:
        b_mean, b_rstd, b_scale, b_shift = load_norm(
            p_mean, p_var, p_scale, p_shift, cols, mask_c, eps
        )
        b_scale *= b_rstd
        b_shift -= b_mean * b_scale
    for tile in range(tl.program_id(0), B * tiles, tl.num_programs(0)):
        b = (tile // tiles).to(tl.int64)
        rows = tile % tiles * BM + tl.arange(0, BM)
        y = (rows // OW * 2 - 1)[:, None] + ky[None, :]
        x = (rows % OW * 2 - 1)[:, None] + kx[None, :]
        mask = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        mask &= (rows < OH * OW)[:, None] & mask_k[None, :]
        at = (y * W + x) * CIN + channel[None, :]
        b_x = tl.load(p_x + b * H * W * CIN + at, mask=mask, other=0.0)
        b_out = tl.dot(b_x, b_weight, input_precision=PRECISION)
        if HAS_NORM:
            b_out = b_out * b_scale + b_shift
        if RELU:
            b_out = tl.where(b_out < 0, 0.0, b_out)  # NaN stays
        at_out = (b * OH * OW + rows)[:, None] * C + cols[None, :]
        mask_out = (rows < OH * OW)[:, None] & mask_c[None, :]
        tl.store(p_out + at_out, b_out.to(p_out.dtype.element_ty), mask=mask_out)


def forward(
    x: Tensor, weight: Tensor, norm: Sequence[Tensor | None], eps: float, relu: bool
) -> Tensor:
    """x (B, H, W, CIN) and weight (C, CIN, 3, 3), contiguous, to (B, OH, OW, C).

    Norm is mean, variance, weight and bias of batch norm, or four times None.
    """
    b, h, w, cin = x.shape
    oh, ow, c = (h + 1) // 2, (w + 1) // 2, weight.shape[0]
    out = torch.empty(b, oh, ow, c, dtype=x.dtype, device=x.device)
    width = max(16, min(MAX_BC, power_of_2(c)))
    blocks, tiles = ceil_div(c, width), ceil_div(oh * ow, BM)
    programs = num_programs(b * tiles, x.device, max(1, RESIDENT // blocks))
    stem_conv_kernel[(programs, blocks)](
        x, weight, *norm, out, tiles, b, h, w, oh, ow, c, eps,
        CIN=cin, BK=max(16, power_of_2(9 * cin)), BM=BM, BC=width,
        HAS_NORM=norm[0] is not None, RELU=relu,
        PRECISION='ieee' if x.dtype == torch.float32 else 'tf32', num_warps=WARPS,
    )  # fmt: skip
    return out
