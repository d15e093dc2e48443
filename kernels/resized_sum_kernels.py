"""Triton kernels and launchers of `resized_sum`.

Maps are (B, H, W, C), pixels of an image contiguous, images any distance apart; the tokens' map is
h x w, where H = h * UP / DOWN. Everything is computed in float32 and rounded once at the store.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.launch import await_previous, kernel
from mmvig.kernels.shares import sum_shares

BC = 64  # channels a program
PIXELS, TOKENS = 32, 16  # a program, of the forward and of the backward


@triton.jit
def between(at, size, UP: tl.constexpr):
    """The two pixels of a row of `size` around pixel `at` of the row UP times as long.

    And the share of the second. Pixel centres lie at half-integers, beyond the ends is the end.
    """
    at = (at.to(tl.float32) + 0.5) / UP - 0.5
    low = tl.floor(at)
    first = low.to(tl.int32)
    return tl.maximum(first, 0), tl.minimum(first + 1, size - 1), at - low


@triton.jit
def load_resized(p, y, x, h, w, C, cols, mask, UP: tl.constexpr, DOWN: tl.constexpr):
    """The tokens' map (h, w, C) at pixels (y, x) of the output's size, bilinear, float32."""
    if DOWN == 2:
        top = 2 * y
        bottom = top + 1
        left = 2 * x
        right = left + 1
        to_bottom = tl.full(y.shape, 0.5, tl.float32)
        to_right = tl.full(x.shape, 0.5, tl.float32)
    else:
        top, bottom, to_bottom = between(y, h, UP)
        left, right, to_right = between(x, w, UP)
    if UP * DOWN == 1:
        at = (y * w + x).to(tl.int64)[:, None] * C + cols[None, :]
        b_out = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
    else:
        at_0 = (top * w + left).to(tl.int64)[:, None] * C + cols[None, :]
        at_1 = (top * w + right).to(tl.int64)[:, None] * C + cols[None, :]
        at_2 = (bottom * w + left).to(tl.int64)[:, None] * C + cols[None, :]
        at_3 = (bottom * w + right).to(tl.int64)[:, None] * C + cols[None, :]
        b_0 = tl.load(p + at_0, mask=mask, other=0.0).to(tl.float32)
        b_1 = tl.load(p + at_1, mask=mask, other=0.0).to(tl.float32)
        b_2 = tl.load(p + at_2, mask=mask, other=0.0).to(tl.float32)
        b_3 = tl.load(p + at_3, mask=mask, other=0.0).to(tl.float32)
        b_0 += (b_1 - b_0) * to_right[:, None]
        b_2 += (b_3 - b_2) * to_right[:, None]
        b_out = b_0 + (b_2 - b_0) * to_bottom[:, None]
    return b_out


@kernel(sizes=['H', 'W', 'h', 'w'])
def resized_sum_kernel(
    p_x, p_tokens, p_y, p_bias, p_mean, p_var, p_weight, p_shift, p_out,
    x_b, t_b, y_b, blocks, H, W, h, w, C, eps,
    UP: tl.constexpr, DOWN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """out = x + y + bias + resize(tokens), and batch norm of it if HAS_NORM.

    A program does BM pixels of an image and BC channels; those of other channels of the same pixels
    come next, so that together they read whole rows of memory.
    """
    await_previous()
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    b = tl.program_id(1).to(tl.int64)
    mask_c = cols < C
    mask = (rows < H * W)[:, None] & mask_c[None, :]
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    b_out = tl.load(p_x + b * x_b + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_Y:
        b_out += tl.load(p_y + b * y_b + at, mask=mask, other=0.0).to(tl.float32)
    b_out += load_resized(p_tokens + b * t_b, rows // W, rows % W, h, w, C, cols, mask, UP, DOWN)
    if HAS_BIAS:
        b_out += tl.load(p_bias + cols, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if HAS_NORM:
        b_mean = tl.load(p_mean + cols, mask=mask_c, other=0.0).to(tl.float32)
        b_var = tl.load(p_var + cols, mask=mask_c, other=1.0).to(tl.float32)
        b_scale = tl.load(p_weight + cols, mask=mask_c, other=0.0).to(tl.float32)
        b_scale *= tl.rsqrt(b_var + eps)
        b_shift = tl.load(p_shift + cols, mask=mask_c, other=0.0).to(tl.float32)
        b_out = (b_out - b_mean[None, :]) * b_scale[None, :] + b_shift[None, :]
    at += b * H * W * C
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)


@kernel(sizes=['H', 'W', 'h', 'w'])
def resized_sum_grad_kernel(
    p_dout, p_dtokens, p_share, d_b, blocks, H, W, h, w, C,
    UP: tl.constexpr, DOWN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dtokens: every token gathers from the 2 UP x 2 UP pixels that it is part of.

    The UP x UP pixels in the middle of them belong to one token alone; their sum over the program's
    tokens is its share of the gradient of the bias, (programs, C). A program does BM tokens and BC
    channels.
    """
    await_previous()
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    tile = tl.program_id(0) // blocks
    rows = tile * BM + tl.arange(0, BM)
    b = tl.program_id(1).to(tl.int64)
    mask_c = cols < C
    mask = (rows < h * w)[:, None] & mask_c[None, :]
    ty = rows // w
    tx = rows % w
    p_dout += b * d_b
    b_sum = tl.zeros([BM, BC], tl.float32)
    b_bias = tl.zeros([BM, BC], tl.float32)
    if DOWN == 2:
        at = (ty // 2 * W + tx // 2).to(tl.int64)[:, None] * C + cols[None, :]
        b_sum = 0.25 * tl.load(p_dout + at, mask=mask, other=0.0).to(tl.float32)
    elif UP == 1:
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        b_sum = tl.load(p_dout + at, mask=mask, other=0.0).to(tl.float32)
    else:
        for i in range(2 * UP):
            y = UP * ty - UP // 2 + i
            first, second, share = between(y, h, UP)
            of_y = tl.where(first == ty, 1 - share, 0.0) + tl.where(second == ty, share, 0.0)
            in_y = (y >= 0) & (y < H)
            own_y = (i >= UP // 2) & (i < UP // 2 + UP)
            for j in tl.static_range(2 * UP):
                x = UP * tx - UP // 2 + j
                first, second, share = between(x, w, UP)
                of_x = tl.where(first == tx, 1 - share, 0.0) + tl.where(second == tx, share, 0.0)
                inside = (in_y & (x >= 0) & (x < W))[:, None] & mask
                at = (y * W + x).to(tl.int64)[:, None] * C + cols[None, :]
                b_dout = tl.load(p_dout + at, mask=inside, other=0.0).to(tl.float32)
                b_sum += (of_y * of_x)[:, None] * b_dout
                if HAS_BIAS and j >= UP // 2 and j < UP // 2 + UP:
                    b_bias += tl.where(own_y, b_dout, 0.0)
    if UP == 1:
        b_bias = b_sum  # weights of a pixel add up to 1
    at = b * h * w * C + rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(p_dtokens + at, b_sum.to(p_dtokens.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        tiles = tl.num_programs(0) // blocks
        p_share += (b * tiles + tile) * C + cols
        tl.store(p_share, tl.sum(b_bias, 0), mask=mask_c)


def _blocks(c: int) -> tuple[int, int]:
    """Channels a program, and blocks of them."""
    width = min(BC, power_of_2(c))
    return width, ceil_div(c, width)


def forward(
    x: Tensor,
    tokens: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    norm: Sequence[Tensor | None],
    eps: float,
    ratio: tuple[int, int],
) -> Tensor:
    """(B, H, W, C) maps x and y, tokens' map (B, h, w, C), to (B, H, W, C), contiguous.

    Norm is mean, variance, weight and bias of batch norm, or four times None; ratio is UP and DOWN.
    """
    b, height, width, c = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels, blocks = _blocks(c)
    grid = (ceil_div(height * width, PIXELS) * blocks, b)
    resized_sum_kernel[grid](
        x, tokens, y, bias, *norm, out, x.stride(0), tokens.stride(0),
        0 if y is None else y.stride(0), blocks, height, width, *tokens.shape[1:3], c, eps,
        UP=ratio[0], DOWN=ratio[1], BM=PIXELS, BC=channels,
        HAS_Y=y is not None, HAS_BIAS=bias is not None, HAS_NORM=norm[0] is not None,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, hw: tuple[int, int], dtype: torch.dtype, ratio: tuple[int, int], has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients to tokens, (B, h, w, C) in a dtype, and to the bias, float32."""
    b, height, width, c = dout.shape
    dtokens = torch.empty(b, *hw, c, dtype=dtype, device=dout.device)
    channels, blocks = _blocks(c)
    tiles = ceil_div(hw[0] * hw[1], TOKENS)
    share = None
    if has_bias:
        share = torch.empty(b * tiles, c, dtype=torch.float32, device=dout.device)
    resized_sum_grad_kernel[(tiles * blocks, b)](
        dout, dtokens, share, dout.stride(0), blocks, height, width, *hw, c,
        UP=ratio[0], DOWN=ratio[1], BM=TOKENS, BC=channels, HAS_BIAS=has_bias,
    )  # fmt: skip
    return dtokens, None if share is None else sum_shares(share)[0]
