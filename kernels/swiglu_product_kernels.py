"""Triton kernel and launcher of `swiglu_product`: a matrix product that ends in SwiGLU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div
from mmvig.kernels.launch import await_previous, kernel

BK = 64
GROUP = 8  # row blocks whose tiles follow each other, so that they share the weights in L2
NARROW = 256  # up to so many input channels the smaller tiles are faster
SMALL_TILES = dict(BM=64, BF=64, STAGES=2, num_warps=4)
LARGE_TILES = dict(BM=128, BF=128, STAGES=3, num_warps=8)


@triton.jit
def load(p, mask, MASKED: tl.constexpr):
    """A tile, zeros where it is masked; without a mask where none is needed."""
    return tl.load(p, mask=mask, other=0.0) if MASKED else tl.load(p)


@kernel(sizes=['M'])
def swiglu_product_kernel(
    p_x, p_weight, p_out, M, x_m,
    C: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = silu(a) * b for [a, b] = x @ weight^T, (M, F); a program does a BM x BF tile of it."""
    await_previous()
    blocks: tl.constexpr = (F + BF - 1) // BF
    group = tl.program_id(0) // (GROUP * blocks)
    inside = tl.program_id(0) % (GROUP * blocks)
    size = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
    rows = (group * GROUP + inside % size) * BM + tl.arange(0, BM)
    cols = inside // size * BF + tl.arange(0, BF)
    ks = tl.arange(0, BK)
    mask_m, mask_f = (rows < M)[:, None], (cols < F)[:, None]
    p_x += rows[:, None].to(tl.int64) * x_m + ks[None, :]
    p_weight += cols[:, None] * C + ks[None, :]
    b_a = tl.zeros([BM, BF], tl.float32)
    b_b = tl.zeros([BM, BF], tl.float32)
    for k in tl.range(0, C, BK, num_stages=STAGES):
        mask_k = (ks < C - k)[None, :]
        b_x = tl.load(p_x + k, mask=mask_m if C % BK == 0 else mask_m & mask_k, other=0.0)
        mask = mask_f & mask_k
        b_w = load(p_weight + k, mask, F % BF + C % BK > 0)
        b_a = tl.dot(b_x, b_w.T, b_a)
        b_w = load(p_weight + F * C + k, mask, F % BF + C % BK > 0)
        b_b = tl.dot(b_x, b_w.T, b_b)
    b_out = b_a * tl.sigmoid(b_a) * b_b
    at = rows[:, None].to(tl.int64) * F + cols[None, :]
    mask = mask_m if F % BF == 0 else mask_m & (cols < F)[None, :]
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """(M, C), rows evenly spaced, and (2 F, C), contiguous, to (M, F); half precision."""
    (m, c), f = x.shape, weight.shape[0] // 2
    out = torch.empty(m, f, dtype=x.dtype, device=x.device)
    tiles = SMALL_TILES if c <= NARROW else LARGE_TILES
    swiglu_product_kernel[(ceil_div(m, tiles['BM']) * ceil_div(f, tiles['BF']),)](
        x, weight, out, m, x.stride(0), C=c, F=f, BK=BK, GROUP=GROUP, **tiles
    )
    return out
