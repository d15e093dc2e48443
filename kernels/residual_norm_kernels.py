"""Triton kernels and launchers of `residual_norm`.

Rows are tokens of C channels, all tensors (M, C) and contiguous; everything is computed in float32
and rounded once at the store. A program holds whole rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, num_programs, power_of_2
from mmvig.kernels.launch import await_previous, kernel

TILE, WARPS = 4096, 8  # elements of a tile of the forward


class Walk(NamedTuple):
    """How programs of the gradients walk over tiles.

    Attributes:
        tile: Elements of a tile.
        warps: Of a program.
        resident: Programs a multiprocessor.
        stages: 2 where the next tile is loaded while this one is in work.
    """

    tile: int
    warps: int
    resident: int
    stages: int


SHORT, LONG = Walk(4096, 4, 2, 1), Walk(2048, 4, 4, 2)
LONG_TILES = 10  # of a program, from which on LONG is faster


@triton.jit
def load_sum(p_x, p_y, p_keep, rows, at, mask, tokens, HAS_Y: tl.constexpr, HAS_KEEP: tl.constexpr):
    """Rows of `x + keep * y`, float32; keep is a factor of each sample of so many tokens."""
    b_x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_Y:
        b_y = tl.load(p_y + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_KEEP:
            b_y *= tl.load(p_keep + rows // tokens)[:, None].to(tl.float32)
        b_x += b_y
    return b_x


@triton.jit
def normalize(b_x, mask_c, C, eps, CENTER: tl.constexpr):
    """Rows of mean square 1, less their mean first if CENTER, and the factors; padding stays 0."""
    if CENTER:
        b_x = tl.where(mask_c, b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)[:, None]
    return b_x * b_scale, b_scale


@kernel(sizes=['M', 'tokens'])
def residual_norm_kernel(
    p_x, p_y, p_keep, p_weight, p_bias, p_sum, p_out, M, C, tokens, eps,
    BM: tl.constexpr, BC: tl.constexpr, HAS_Y: tl.constexpr, HAS_KEEP: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    """sum = x + keep * y, out = weight * normalize(sum) + bias; one program does BM rows."""
    await_previous()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BC)
    mask_c = (cols < C)[None, :]
    mask = (rows < M)[:, None] & mask_c
    at = rows[:, None].to(tl.int64) * C + cols[None, :]
    rows = tl.minimum(rows, M - 1)
    b_x = load_sum(p_x, p_y, p_keep, rows, at, mask, tokens, HAS_Y, HAS_KEEP)
    if HAS_Y:
        # the norm sees what the rest of the network sees
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + at, b_sum, mask=mask)
        b_x = b_sum.to(tl.float32)
    b_n, _ = normalize(b_x, mask_c, C, eps, CENTER)
    b_out = b_n * tl.load(p_weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if CENTER:
        b_out += tl.load(p_bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)


@kernel(sizes=['M', 'tokens'])
def residual_norm_grad_kernel(
    p_sum, p_keep, p_weight, p_dsum, p_dout, p_dx, p_dy, p_share, p_out, M, C, tokens, eps,
    BM: tl.constexpr, BC: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_KEEP: tl.constexpr, CENTER: tl.constexpr, WITH_OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients to x and y, and this program's shares of those to weight and bias.

    With n the normalized row, s its factor and e = weight * dout:
    dx = s (e - n mean(e n) - mean(e) if CENTER) + dsum, dy = keep * dx. And the norm, weight * n
    without a bias, if WITH_OUT.
    Every program takes each num_programs-th tile of BM rows; shares are (programs, 2, C), the
    second of the two without CENTER left out.
    """
    await_previous()
    cols = tl.arange(0, BC)
    mask_c = (cols < C)[None, :]
    b_weight = tl.load(p_weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros([BM, BC], tl.float32)
    b_dbias = tl.zeros([BM, BC], tl.float32)
    step = tl.num_programs(0) * BM
    for start in tl.range(tl.program_id(0) * BM, M, step, num_stages=STAGES):
        rows = start + tl.arange(0, BM)
        mask = (rows < M)[:, None] & mask_c
        at = rows[:, None].to(tl.int64) * C + cols[None, :]
        b_x = tl.load(p_sum + at, mask=mask, other=0.0)
        if STAGES == 1:  # else they are loaded ahead anyway, and would take registers from here on
            b_dout = tl.load(p_dout + at, mask=mask, other=0.0)
            if HAS_DSUM:
                b_dsum = tl.load(p_dsum + at, mask=mask, other=0.0)
        b_n, b_scale = normalize(b_x.to(tl.float32), mask_c, C, eps, CENTER)
        if STAGES > 1:
            b_dout = tl.load(p_dout + at, mask=mask, other=0.0)
        b_dout = b_dout.to(tl.float32)
        b_dweight += b_dout * b_n
        if WITH_OUT:
            tl.store(p_out + at, (b_n * b_weight).to(p_out.dtype.element_ty), mask=mask)
        b_e = b_dout * b_weight
        b_dx = b_e - b_n * (tl.sum(b_e * b_n, 1) / C)[:, None]
        if CENTER:
            b_dbias += b_dout
            b_dx -= (tl.sum(b_e, 1) / C)[:, None]
        b_dx *= b_scale
        if HAS_DSUM:
            if STAGES > 1:
                b_dsum = tl.load(p_dsum + at, mask=mask, other=0.0)
            b_dx += b_dsum.to(tl.float32)
        tl.store(p_dx + at, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        if HAS_Y:
            if HAS_KEEP:
                b_keep = tl.load(p_keep + tl.minimum(rows, M - 1) // tokens)
                b_dx *= b_keep[:, None].to(tl.float32)
            tl.store(p_dy + at, b_dx.to(p_dy.dtype.element_ty), mask=mask)
    p_share += tl.program_id(0) * (2 * C if CENTER else C) + cols
    tl.store(p_share, tl.sum(b_dweight, 0), mask=cols < C)
    if CENTER:
        tl.store(p_share + C, tl.sum(b_dbias, 0), mask=cols < C)


def forward(
    x: Tensor,
    y: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(x + keep * y, norm of that); without y the first is x itself."""
    c = x.shape[-1]
    m = x.numel() // c
    out = torch.empty_like(x, dtype=out_dtype)
    total = x
    if y is not None:
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    block = power_of_2(c)
    rows = max(1, TILE // block)
    residual_norm_kernel[(ceil_div(m, rows),)](
        x, y, keep, weight, bias, total, out, m, c, m // x.shape[0], eps,
        BM=rows, BC=block, HAS_Y=y is not None, HAS_KEEP=keep is not None,
        CENTER=bias is not None, num_warps=WARPS,
    )  # fmt: skip
    return total, out


def backward(
    total: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    dsum: Tensor | None,
    dout: Tensor,
    eps: float,
    y_dtype: torch.dtype | None,
    center: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients to x, y, and shares (P, 1 or 2, C) of those to weight and bias.

    Out, if given, is filled with RMSNorm's result, so that nobody has to keep it.
    """
    c = total.shape[-1]
    m = total.numel() // c
    dx = torch.empty_like(total)
    dy = None if y_dtype is None else torch.empty_like(total, dtype=y_dtype)
    block = power_of_2(c)
    tiles = m * block // LONG.tile
    is_long = tiles >= LONG_TILES * num_programs(tiles, total.device, LONG.resident)
    walk = LONG if is_long else SHORT
    rows = max(1, walk.tile // block)
    programs = num_programs(ceil_div(m, rows), total.device, walk.resident)
    share = total.new_empty(programs, 2 if center else 1, c, dtype=torch.float32)
    residual_norm_grad_kernel[(programs,)](
        total, keep, weight, dsum, dout, dx, dy, share, out, m, c, m // total.shape[0], eps,
        BM=rows, BC=block, HAS_DSUM=dsum is not None, HAS_Y=dy is not None,
        HAS_KEEP=keep is not None, CENTER=center, WITH_OUT=out is not None, STAGES=walk.stages,
        num_warps=walk.warps,
    )  # fmt: skip
    return dx, dy, share
