"""Triton kernels and launchers of `depthwise_conv`: 3x3, padding 1, on tokens (B, S, C).

The S tokens are those of up to three maps, one after another. A program takes BW neighbouring
columns and BC channels of a band of rows of one map, and walks down: three rows of inputs, each
also one column to the left and one to the right, stay in registers, so an input is loaded three
times, twice from the L1 cache. The row after them is loaded while they are used. Sums are float32.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, multiprocessors
from mmvig.kernels.launch import await_previous, kernel

MAX_MAPS = 3
BW = 8
BC = 64
WARPS = 4
# Programs that a multiprocessor of Hopper holds at once, by registers: of the conv, and of the
# gradient to the weights, of which there are no more than one for each share that is added up.
RESIDENT = 4
RESIDENT_GRAD = 3
MIN_ROWS = 4  # of a band
OVERHEAD = 6  # of a program, in rows: two more rows, weights, and the sums at its end


@triton.jit
def find_map(tile, rows, H0, W0, H1, W1, H2, W2, BW: tl.constexpr):
    """Height, width, first token, first row and first column of a tile, counted over all maps."""
    tiles0 = tl.cdiv(H0, rows) * tl.cdiv(W0, BW)
    tiles1 = tl.cdiv(H1, rows) * tl.cdiv(W1, BW)
    second = (tile >= tiles0) & (tile < tiles0 + tiles1)
    third = tile >= tiles0 + tiles1
    height = tl.where(third, H2, tl.where(second, H1, H0))
    width = tl.where(third, W2, tl.where(second, W1, W0))
    start = tl.where(third, H0 * W0 + H1 * W1, tl.where(second, H0 * W0, 0))
    tile -= tl.where(third, tiles0 + tiles1, tl.where(second, tiles0, 0))
    bands = tl.cdiv(height, rows)
    return height, width, start, (tile % bands) * rows, (tile // bands) * BW


@triton.jit
def load_row(p_x, row, cols, channels, mask_c, H, W, C):
    """Inputs left of, at and right of some columns of a row, 0 outside the map."""
    mask = mask_c & ((row >= 0) & (row < H))
    p = p_x + (row * W + cols).to(tl.int64)[:, None] * C + channels[None, :]
    left = tl.load(p - C, mask=mask & ((cols >= 1) & (cols <= W))[:, None], other=0.0)
    middle = tl.load(p, mask=mask & (cols < W)[:, None], other=0.0)
    right = tl.load(p + C, mask=mask & (cols + 1 < W)[:, None], other=0.0)
    return left, middle, right


@triton.jit
def widen(x, y, z):
    """A row's inputs in float32."""
    return x.to(tl.float32), y.to(tl.float32), z.to(tl.float32)


@triton.jit
def load_weights(p_weight, row, channels, C, FLIP: tl.constexpr):
    """Three weights of a row of the filter for some channels; of the turned filter if FLIP."""
    p = p_weight + channels * 9
    mask = channels < C
    if FLIP:
        p += 8 - 3 * row
        w0 = tl.load(p, mask=mask, other=0.0)
        w1 = tl.load(p - 1, mask=mask, other=0.0)
        w2 = tl.load(p - 2, mask=mask, other=0.0)
    else:
        p += 3 * row
        w0 = tl.load(p, mask=mask, other=0.0)
        w1 = tl.load(p + 1, mask=mask, other=0.0)
        w2 = tl.load(p + 2, mask=mask, other=0.0)
    return w0.to(tl.float32)[None, :], w1.to(tl.float32)[None, :], w2.to(tl.float32)[None, :]


@triton.jit
def activate(b_x, ACT: tl.constexpr):
    """Identity, SiLU or GELU (the exact one)."""
    if ACT == 'silu':
        b_x *= tl.sigmoid(b_x)
    if ACT == 'gelu':
        b_x *= 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
    return b_x


@triton.jit
def slope(b_x, ACT: tl.constexpr):
    """The derivative of `activate`."""
    if ACT == 'silu':
        b_s = tl.sigmoid(b_x)
        b_x = b_s * (1 + b_x * (1 - b_s))
    if ACT == 'gelu':
        b_cdf = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        b_x = b_cdf + b_x * 0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)
    return b_x


@kernel(sizes=['S', 'rows', 'H0', 'W0', 'H1', 'W1', 'H2', 'W2'])
def convolve_kernel(
    p_x, p_weight, p_bias, p_out, S, C, rows, H0, W0, H1, W1, H2, W2,
    BW: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    """out = activate(conv(x) + bias), with the turned filter if FLIP.

    Grid: (tiles of all maps, blocks of channels, B).
    """
    await_previous()
    H, W, start, first, col = find_map(tl.program_id(0), rows, H0, W0, H1, W1, H2, W2, BW)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    cols = col + tl.arange(0, BW)
    mask_c = (channels < C)[None, :]
    offset = (tl.program_id(2).to(tl.int64) * S + start) * C
    p_x += offset
    p_out += offset
    w00, w01, w02 = load_weights(p_weight, 0, channels, C, FLIP)
    w10, w11, w12 = load_weights(p_weight, 1, channels, C, FLIP)
    w20, w21, w22 = load_weights(p_weight, 2, channels, C, FLIP)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    a0, a1, a2 = load_row(p_x, first - 1, cols, channels, mask_c, H, W, C)
    b0, b1, b2 = load_row(p_x, first, cols, channels, mask_c, H, W, C)
    n0, n1, n2 = load_row(p_x, first + 1, cols, channels, mask_c, H, W, C)
    a0, a1, a2 = widen(a0, a1, a2)
    b0, b1, b2 = widen(b0, b1, b2)
    for row in range(first, tl.minimum(first + rows, H)):
        c0, c1, c2 = widen(n0, n1, n2)
        n0, n1, n2 = load_row(p_x, row + 2, cols, channels, mask_c, H, W, C)
        b_out = a0 * w00 + a1 * w01 + a2 * w02 + b0 * w10 + b1 * w11 + b2 * w12
        b_out += c0 * w20 + c1 * w21 + c2 * w22
        if HAS_BIAS:
            b_out += b_bias
        b_out = activate(b_out, ACT)
        p = p_out + (row * W + cols).to(tl.int64)[:, None] * C + channels[None, :]
        tl.store(p, b_out.to(p_out.dtype.element_ty), mask=mask_c & (cols < W)[:, None])
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2


@kernel(sizes=['S', 'rows', 'H0', 'W0', 'H1', 'W1', 'H2', 'W2'])
def weight_grad_kernel(
    p_x, p_weight, p_bias, p_dout, p_dpre, p_share, S, C, rows, H0, W0, H1, W1, H2, W2,
    BW: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """This program's share of the gradients of weight and bias: (programs, C, 10), the bias last.

    With an activation the conv is computed again, and dpre, the gradient to its result, written.
    Grid as `convolve_kernel`'s.
    """
    await_previous()
    H, W, start, first, col = find_map(tl.program_id(0), rows, H0, W0, H1, W1, H2, W2, BW)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    cols = col + tl.arange(0, BW)
    mask_c = (channels < C)[None, :]
    offset = (tl.program_id(2).to(tl.int64) * S + start) * C
    p_x += offset
    p_dout += offset
    p_dpre += offset
    if ACT != 'none':
        w00, w01, w02 = load_weights(p_weight, 0, channels, C, False)
        w10, w11, w12 = load_weights(p_weight, 1, channels, C, False)
        w20, w21, w22 = load_weights(p_weight, 2, channels, C, False)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    d00 = tl.zeros([BW, BC], tl.float32)
    d01, d02, d10, d11, d12, d20, d21, d22, d_bias = d00, d00, d00, d00, d00, d00, d00, d00, d00
    a0, a1, a2 = load_row(p_x, first - 1, cols, channels, mask_c, H, W, C)
    b0, b1, b2 = load_row(p_x, first, cols, channels, mask_c, H, W, C)
    n0, n1, n2 = load_row(p_x, first + 1, cols, channels, mask_c, H, W, C)
    mask_out = mask_c & (cols < W)[:, None]
    at = (first * W + cols).to(tl.int64)[:, None] * C + channels[None, :]
    b_next = tl.load(p_dout + at, mask=mask_out & (first < H), other=0.0)
    a0, a1, a2 = widen(a0, a1, a2)
    b0, b1, b2 = widen(b0, b1, b2)
    for row in range(first, tl.minimum(first + rows, H)):
        c0, c1, c2 = widen(n0, n1, n2)
        b_d = b_next.to(tl.float32)
        at = (row * W + cols).to(tl.int64)[:, None] * C + channels[None, :]
        n0, n1, n2 = load_row(p_x, row + 2, cols, channels, mask_c, H, W, C)
        b_next = tl.load(p_dout + at + W * C, mask=mask_out & (row + 1 < H), other=0.0)
        if ACT != 'none':
            b_pre = a0 * w00 + a1 * w01 + a2 * w02 + b0 * w10 + b1 * w11 + b2 * w12
            b_pre += c0 * w20 + c1 * w21 + c2 * w22
            if HAS_BIAS:
                b_pre += b_bias
            b_dpre = (b_d * slope(b_pre, ACT)).to(p_dpre.dtype.element_ty)
            tl.store(p_dpre + at, b_dpre, mask=mask_out)
            b_d = b_dpre.to(tl.float32)
        d00 += b_d * a0
        d01 += b_d * a1
        d02 += b_d * a2
        d10 += b_d * b0
        d11 += b_d * b1
        d12 += b_d * b2
        d20 += b_d * c0
        d21 += b_d * c1
        d22 += b_d * c2
        d_bias += b_d
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    share = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    p = p_share + (share.to(tl.int64) * C + channels) * 10
    tl.store(p, tl.sum(d00, 0), mask=channels < C)
    tl.store(p + 1, tl.sum(d01, 0), mask=channels < C)
    tl.store(p + 2, tl.sum(d02, 0), mask=channels < C)
    tl.store(p + 3, tl.sum(d10, 0), mask=channels < C)
    tl.store(p + 4, tl.sum(d11, 0), mask=channels < C)
    tl.store(p + 5, tl.sum(d12, 0), mask=channels < C)
    tl.store(p + 6, tl.sum(d20, 0), mask=channels < C)
    tl.store(p + 7, tl.sum(d21, 0), mask=channels < C)
    tl.store(p + 8, tl.sum(d22, 0), mask=channels < C)
    tl.store(p + 9, tl.sum(d_bias, 0), mask=channels < C)


def _grid(
    x: Tensor, shapes: list[tuple[int, int]], resident: int
) -> tuple[tuple[int, int, int], list[int]]:
    """Grid, and rows of a band followed by the sizes of three maps.

    A multiprocessor holds so many programs at once.
    """
    b, _, c = x.shape
    blocks = ceil_div(c, BC)
    slots = resident * multiprocessors(x.device)
    rows, tiles = _bands(tuple(shapes), blocks * b, slots)
    sizes = [n for hw in shapes for n in hw] + [0, 0] * (MAX_MAPS - len(shapes))
    return (tiles, blocks, b), [rows, *sizes]


@lru_cache(maxsize=1024)
def _bands(shapes: tuple[tuple[int, int], ...], copies: int, slots: int) -> tuple[int, int]:
    """Rows of a band, and tiles of all maps, that take least time on a device of so many slots.

    Every tile is there `copies` times. A program costs its rows and about `OVERHEAD` more, and
    programs run in waves.
    """

    def tiles(rows: int) -> int:
        return sum(ceil_div(h, rows) * ceil_div(w, BW) for h, w in shapes)

    def cost(rows: int) -> int:
        return ceil_div(tiles(rows) * copies, slots) * (rows + OVERHEAD)

    highest = max(MIN_ROWS, *(h for h, _ in shapes))
    rows = min(range(MIN_ROWS, highest + 1), key=cost)
    return rows, tiles(rows)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shapes: list[tuple[int, int]],
    act: str,
    flip: bool = False,
) -> Tensor:
    """x (B, S, C), contiguous, weight (C, 1, 3, 3), to (B, S, C); act is none, silu or gelu."""
    grid, sizes = _grid(x, shapes, RESIDENT)
    out = torch.empty_like(x)
    convolve_kernel[grid](
        x, weight, bias, out, x.shape[1], x.shape[2], *sizes,
        BW=BW, BC=BC, HAS_BIAS=bias is not None, ACT=act, FLIP=flip, num_warps=WARPS,
    )  # fmt: skip
    return out


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    shapes: list[tuple[int, int]],
    act: str,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients to x, and shares (P, C, 10) to weight and bias; x and dout are contiguous."""
    grid, sizes = _grid(x, shapes, RESIDENT_GRAD)
    c = x.shape[2]
    share = torch.empty(grid[0] * grid[2], c, 10, dtype=torch.float32, device=x.device)
    dpre = dout if act == 'none' else torch.empty_like(x)
    weight_grad_kernel[grid](
        x, weight, bias, dout, dpre, share, x.shape[1], c, *sizes,
        BW=BW, BC=BC, HAS_BIAS=bias is not None, ACT=act, num_warps=WARPS,
    )  # fmt: skip
    dx = convolve(dpre, weight, None, shapes, 'none', flip=True) if needs_x else None
    return dx, share
