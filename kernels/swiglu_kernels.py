"""Triton kernels and launchers of `swiglu`; float32 inside, rounded once at the store."""

import torch
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, power_of_2
from mmvig.kernels.launch import await_previous, kernel

TILE = 2048


@kernel(sizes=['M'])
def swiglu_kernel(p_x, p_out, M, F, stride, BF: tl.constexpr, BM: tl.constexpr):
    """out = silu(a) * b for rows [a, b] of x (M, 2 F); a program does a BM x BF tile of out."""
    await_previous()
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    at = rows[:, None].to(tl.int64) * stride + cols[None, :]
    b_a = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_x + F + at, mask=mask, other=0.0).to(tl.float32)
    b_out = b_a * tl.sigmoid(b_a) * b_b
    at = rows[:, None].to(tl.int64) * F + cols[None, :]
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)


@kernel(sizes=['M'])
def swiglu_grad_kernel(
    p_x, p_dout, p_dx, p_out, M, F, stride,
    BF: tl.constexpr, BM: tl.constexpr, WITH_OUT: tl.constexpr,
):  # fmt: skip
    """Both halves of dx (M, 2 F) from dout (M, F), and out again if WITH_OUT; tiles as above."""
    await_previous()
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    at = rows[:, None].to(tl.int64) * stride + cols[None, :]
    b_a = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_x + F + at, mask=mask, other=0.0).to(tl.float32)
    at = rows[:, None].to(tl.int64) * F + cols[None, :]
    b_dout = tl.load(p_dout + at, mask=mask, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_a)
    if WITH_OUT:
        b_out = b_a * b_s * b_b
        tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)
    b_da = b_dout * b_b * b_s * (1 + b_a * (1 - b_s))
    at += rows[:, None].to(tl.int64) * F
    tl.store(p_dx + at, b_da.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dx + F + at, (b_dout * b_a * b_s).to(p_dx.dtype.element_ty), mask=mask)


def _tiles(x: Tensor) -> tuple[int, int, tuple[int, int], dict[str, int]]:
    m, f = x.shape[0], x.shape[1] // 2
    bf = min(power_of_2(f), 512)
    bm = TILE // bf if bf <= TILE else 1
    return m, f, (ceil_div(m, bm), ceil_div(f, bf)), dict(BF=bf, BM=bm)


def forward(x: Tensor) -> Tensor:
    """x (M, 2 F), rows of any stride, to (M, F)."""
    m, f, grid, tile = _tiles(x)
    out = x.new_empty(m, f)
    swiglu_kernel[grid](x, out, m, f, x.stride(0), **tile)
    return out


def backward(x: Tensor, dout: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient to x, contiguous; dout (M, F) is contiguous.

    Out, if given, is filled with the forward's result, so that nobody has to keep it.
    """
    m, f, grid, tile = _tiles(x)
    dx = torch.empty(m, 2 * f, dtype=x.dtype, device=x.device)
    swiglu_grad_kernel[grid](x, dout, dx, out, m, f, x.stride(0), **tile, WITH_OUT=out is not None)
    return dx
