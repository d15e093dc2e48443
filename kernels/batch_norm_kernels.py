"""Triton kernels and launchers of `batch_norm`.

Maps are (M, C), M = B * H * W pixels, contiguous; everything is computed in float32 and rounded
once at the store. With POOL what leaves is the 3x3 maximum at every other pixel, (B, OH, OW, C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, num_programs, power_of_2
from mmvig.kernels.launch import await_previous, kernel
from mmvig.kernels.shares import sum_shares

BC = 64  # channels a program
BM = {'stats': 64, 'plain': 32, 'pool': 16}  # pixels a tile, by what the registers have to hold
PER_MULTIPROCESSOR = 4  # programs with a share
BP, BN = 128, 32  # shares and channels a step of `batch_norm_finish_kernel`


@kernel(sizes=['M', 'each'])
def batch_norm_stats_kernel(p_x, p_share, M, C, each, BM: tl.constexpr, BC: tl.constexpr):
    """Mean, and sum of squared distances from it, of `each` pixels a program: share (P, 2, C).

    Sums are of distances from the program's first pixel, so that a large mean costs no digits.
    """
    await_previous()
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    mask_c = cols < C
    begin = tl.program_id(0) * each
    end = tl.minimum(begin + each, M)
    b_first = tl.load(p_x + begin.to(tl.int64) * C + cols, mask=mask_c, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BM, BC], tl.float32)
    b_squares = tl.zeros([BM, BC], tl.float32)
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        mask = (rows < end)[:, None] & mask_c[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        b_x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32) - b_first[None, :]
        b_x = tl.where(mask, b_x, 0.0)
        b_sum += b_x
        b_squares += b_x * b_x
    b_mean = tl.sum(b_sum, 0) / (end - begin)
    b_m2 = tl.sum(b_squares, 0) - b_mean * b_mean * (end - begin)
    p_share += tl.program_id(0) * 2 * C + cols
    tl.store(p_share, b_first + b_mean, mask=mask_c)
    tl.store(p_share + C, tl.maximum(b_m2, 0.0), mask=mask_c)


@kernel(sizes=['M', 'each', 'programs'])
def batch_norm_finish_kernel(
    p_share, p_stats, p_mean, p_var, M, C, each, programs, momentum,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Mean and variance of all pixels, (2, C), from the shares; moves the running ones there.

    The running variance is the unbiased one. A program does BN channels.
    """
    await_previous()
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    mask_c = cols < C
    b_mean = tl.zeros([BP, BN], tl.float32)
    for start in range(0, programs, BP):
        rows = start + tl.arange(0, BP)
        mask = (rows < programs)[:, None] & mask_c[None, :]
        b_n = tl.minimum(each, M - rows * each).to(tl.float32)[:, None]
        at = rows[:, None] * 2 * C + cols[None, :]
        b_mean += b_n * tl.load(p_share + at, mask=mask, other=0.0)
    b_mean = tl.sum(b_mean, 0) / M
    b_m2 = tl.zeros([BP, BN], tl.float32)
    for start in range(0, programs, BP):
        rows = start + tl.arange(0, BP)
        mask = (rows < programs)[:, None] & mask_c[None, :]
        b_n = tl.minimum(each, M - rows * each).to(tl.float32)[:, None]
        at = rows[:, None] * 2 * C + cols[None, :]
        b_off = tl.load(p_share + at, mask=mask, other=0.0) - b_mean[None, :]
        b_add = tl.load(p_share + at + C, mask=mask, other=0.0) + b_n * b_off * b_off
        b_m2 += tl.where(mask, b_add, 0.0)
    b_m2 = tl.sum(b_m2, 0)
    tl.store(p_stats + cols, b_mean, mask=mask_c)
    tl.store(p_stats + C + cols, b_m2 / M, mask=mask_c)
    b_old = tl.load(p_mean + cols, mask=mask_c, other=0.0)
    tl.store(p_mean + cols, b_old + momentum * (b_mean - b_old), mask=mask_c)
    b_old = tl.load(p_var + cols, mask=mask_c, other=0.0)
    tl.store(p_var + cols, b_old + momentum * (b_m2 / (M - 1) - b_old), mask=mask_c)


@triton.jit
def load_norm(p_mean, p_var, p_weight, p_bias, cols, mask_c, eps):
    """Mean, 1 / standard deviation, weight and bias of some channels, (1, BC) each."""
    b_mean = tl.load(p_mean + cols, mask=mask_c, other=0.0).to(tl.float32)
    b_var = tl.load(p_var + cols, mask=mask_c, other=1.0).to(tl.float32)
    b_weight = tl.load(p_weight + cols, mask=mask_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + cols, mask=mask_c, other=0.0).to(tl.float32)
    return b_mean[None, :], tl.rsqrt(b_var + eps)[None, :], b_weight[None, :], b_bias[None, :]


@kernel(sizes=['M'])
def batch_norm_apply_kernel(
    p_x, p_mean, p_var, p_weight, p_bias, p_out, blocks, M, C, eps,
    BM: tl.constexpr, BC: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """out = weight * (x - mean) / sqrt(var + eps) + bias, and ReLU; BM pixels, BC channels."""
    await_previous()
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    mask_c = cols < C
    mask = (rows < M)[:, None] & mask_c[None, :]
    b_mean, b_rstd, b_weight, b_bias = load_norm(p_mean, p_var, p_weight, p_bias, cols, mask_c, eps)
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    b_x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    b_out = (b_x - b_mean) * (b_rstd * b_weight) + b_bias
    if RELU:
        b_out = tl.where(b_out < 0, 0.0, b_out)  # NaN stays
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)


@kernel(sizes=['H', 'W', 'OH', 'OW'])
def batch_norm_pool_kernel(
    p_x, p_mean, p_var, p_weight, p_bias, p_out, p_tap, blocks, H, W, OH, OW, C, eps,
    BM: tl.constexpr, BC: tl.constexpr, RELU: tl.constexpr, HAS_TAP: tl.constexpr,
):  # fmt: skip
    """The maximum of out, as above, over 3x3 pixels around every other one, and which it was.

    Pixels of the window count from 0 to 8, row by row; the first of equal ones. A program does BM
    pixels of one image's result and BC channels.
    """
    await_previous()
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    b = tl.program_id(1).to(tl.int64)
    mask_c = cols < C
    mask = (rows < OH * OW)[:, None] & mask_c[None, :]
    b_mean, b_rstd, b_weight, b_bias = load_norm(p_mean, p_var, p_weight, p_bias, cols, mask_c, eps)
    b_scale = b_rstd * b_weight
    top = rows // OW * 2 - 1
    left = rows % OW * 2 - 1
    p_x += b * H * W * C
    b_best = tl.full([BM, BC], float('-inf'), tl.float32)
    b_tap = tl.zeros([BM, BC], tl.int32)
    for tap in tl.static_range(9):
        y = top + tap // 3
        x = left + tap % 3
        inside = ((y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None] & mask
        at = (y * W + x).to(tl.int64)[:, None] * C + cols[None, :]
        b_x = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
        b_x = tl.where(inside, (b_x - b_mean) * b_scale + b_bias, float('-inf'))
        better = (b_x > b_best) | (b_x != b_x)
        b_best = tl.where(better, b_x, b_best)
        b_tap = tl.where(better, tap, b_tap)
    if RELU:
        b_best = tl.where(b_best < 0, 0.0, b_best)
    at = b * OH * OW * C + rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(p_out + at, b_best.to(p_out.dtype.element_ty), mask=mask)
    if HAS_TAP:
        tl.store(p_tap + at, b_tap.to(tl.int8), mask=mask)


@triton.jit
def load_grad(p_dout, p_tap, rows, cols, mask, H, W, OH, OW, C, POOL: tl.constexpr):
    """The gradient of what was pooled, or of what was not, at some pixels, float32."""
    if POOL:
        x = rows % W
        y = rows // W % H
        image = (rows // W // H).to(tl.int64) * OH * OW
        b_grad = tl.zeros(mask.shape, tl.float32)
        for part in tl.static_range(4):  # the windows that a pixel with odd y and x is part of
            oy = (y + part // 2) // 2
            ox = (x + part % 2) // 2
            has = (part // 2 == 0) | (y % 2 == 1)
            has &= (part % 2 == 0) | (x % 2 == 1)
            has &= (oy < OH) & (ox < OW)
            tap = (y - 2 * oy + 1) * 3 + x - 2 * ox + 1
            at = (image + oy * OW + ox)[:, None] * C + cols[None, :]
            b_tap = tl.load(p_tap + at, mask=has[:, None] & mask, other=-1).to(tl.int32)
            b_dout = tl.load(p_dout + at, mask=has[:, None] & mask, other=0.0).to(tl.float32)
            b_grad += tl.where(b_tap == tap[:, None], b_dout, 0.0)
    else:
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        b_grad = tl.load(p_dout + at, mask=mask, other=0.0).to(tl.float32)
    return b_grad


@kernel(sizes=['H', 'W', 'OH', 'OW', 'M', 'each'])
def batch_norm_sums_kernel(
    p_x, p_mean, p_var, p_weight, p_bias, p_dout, p_tap, p_share, H, W, OH, OW, M, C, each, eps,
    BM: tl.constexpr, BC: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Shares (P, 2, C) of the gradients to weight and bias, of `each` pixels a program.

    n is x normalized, g the gradient of weight * n + bias: sums of g n, and of g.
    """
    await_previous()
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    mask_c = cols < C
    b_mean, b_rstd, b_weight, b_bias = load_norm(p_mean, p_var, p_weight, p_bias, cols, mask_c, eps)
    begin = tl.program_id(0) * each
    end = tl.minimum(begin + each, M)
    b_dweight = tl.zeros([BM, BC], tl.float32)
    b_dbias = tl.zeros([BM, BC], tl.float32)
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        mask = (rows < end)[:, None] & mask_c[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        b_n = (tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32) - b_mean) * b_rstd
        b_g = load_grad(p_dout, p_tap, rows, cols, mask, H, W, OH, OW, C, POOL)
        if RELU:
            b_g = tl.where(b_n * b_weight + b_bias > 0, b_g, 0.0)
        b_dweight += b_g * b_n
        b_dbias += b_g
    p_share += tl.program_id(0) * 2 * C + cols
    tl.store(p_share, tl.sum(b_dweight, 0), mask=mask_c)
    tl.store(p_share + C, tl.sum(b_dbias, 0), mask=mask_c)


@kernel(sizes=['H', 'W', 'OH', 'OW', 'M'])
def batch_norm_grad_kernel(
    p_x, p_mean, p_var, p_weight, p_bias, p_dout, p_tap, p_sums, p_dx,
    blocks, H, W, OH, OW, M, C, eps,
    BM: tl.constexpr, BC: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """dx = weight / std * (g - mean(g) - n mean(g n)), from the sums of g n and of g, (2, C)."""
    await_previous()
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    mask_c = cols < C
    mask = (rows < M)[:, None] & mask_c[None, :]
    b_mean, b_rstd, b_weight, b_bias = load_norm(p_mean, p_var, p_weight, p_bias, cols, mask_c, eps)
    b_along = tl.load(p_sums + cols, mask=mask_c, other=0.0)[None, :] / M
    b_all = tl.load(p_sums + C + cols, mask=mask_c, other=0.0)[None, :] / M
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    b_n = (tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32) - b_mean) * b_rstd
    b_g = load_grad(p_dout, p_tap, rows, cols, mask, H, W, OH, OW, C, POOL)
    if RELU:
        b_g = tl.where(b_n * b_weight + b_bias > 0, b_g, 0.0)
    b_dx = b_weight * b_rstd * (b_g - b_all - b_n * b_along)
    tl.store(p_dx + at, b_dx.to(p_dx.dtype.element_ty), mask=mask)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Pixels, channels, channels a program, and blocks of them."""
    c = x.shape[-1]
    width = min(BC, power_of_2(c))
    return x.numel() // c, c, width, ceil_div(c, width)


def _spread(m: int, tile: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Pixels a program, a multiple of a tile, and programs."""
    programs = num_programs(ceil_div(m, tile), device, max(1, PER_MULTIPROCESSOR // blocks))
    each = ceil_div(ceil_div(m, programs), tile) * tile
    return each, ceil_div(m, each)


def statistics(x: Tensor, mean: Tensor, var: Tensor, momentum: float) -> Tensor:
    """(2, C): mean and variance of the pixels of x (..., C); moves the running ones there."""
    m, c, width, blocks = _sizes(x)
    each, programs = _spread(m, BM['stats'], blocks, x.device)
    share = torch.empty(programs, 2, c, dtype=torch.float32, device=x.device)
    stats = torch.empty(2, c, dtype=torch.float32, device=x.device)
    batch_norm_stats_kernel[(programs, blocks)](x, share, m, c, each, BM=BM['stats'], BC=width)
    batch_norm_finish_kernel[(ceil_div(c, BN),)](
        share, stats, mean, var, m, c, each, programs, momentum, BP=BP, BN=BN
    )
    return stats


def forward(
    x: Tensor, stats: list[Tensor], eps: float, relu: bool, pool: bool, with_tap: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x (B, H, W, C), contiguous, to the same or, if pooled, (B, OH, OW, C); and the taps.

    `stats` are mean, variance, weight and bias.
    """
    m, c, width, blocks = _sizes(x)
    tile = BM['pool' if pool else 'plain']
    settings = dict(BM=tile, BC=width, RELU=relu)
    if not pool:
        out = torch.empty_like(x)
        batch_norm_apply_kernel[(ceil_div(m, tile) * blocks,)](
            x, *stats, out, blocks, m, c, eps, **settings
        )
        return out, None
    b, height, w = x.shape[:3]
    oh, ow = pooled(height), pooled(w)
    out = torch.empty(b, oh, ow, c, dtype=x.dtype, device=x.device)
    tap = torch.empty(out.shape, dtype=torch.int8, device=x.device) if with_tap else None
    batch_norm_pool_kernel[(ceil_div(oh * ow, tile) * blocks, b)](
        x, *stats, out, tap, blocks, height, w, oh, ow, c, eps, **settings, HAS_TAP=with_tap
    )
    return out, tap


def backward(
    x: Tensor, stats: list[Tensor], tap: Tensor | None, dout: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to x, and (2, C) to weight and bias, where the statistics are those of x itself."""
    m, c, width, blocks = _sizes(x)
    tile = BM['plain' if tap is None else 'pool']
    each, programs = _spread(m, tile, blocks, x.device)
    share = torch.empty(programs, 2, c, dtype=torch.float32, device=x.device)
    sizes = (*x.shape[1:3], *dout.shape[1:3], m, c)
    settings = dict(BM=tile, BC=width, RELU=relu, POOL=tap is not None)
    batch_norm_sums_kernel[(programs, blocks)](
        x, *stats, dout, tap, share, *sizes, each, eps, **settings
    )
    sums = sum_shares(share)[0]
    dx = torch.empty_like(x)
    batch_norm_grad_kernel[(ceil_div(m, tile) * blocks,)](
        x, *stats, dout, tap, sums, dx, blocks, *sizes, eps, **settings
    )
    return dx, sums


def pooled(size: int) -> int:
    """A side after 3x3 pooling with stride 2 and padding 1."""
    return (size - 1) // 2 + 1
