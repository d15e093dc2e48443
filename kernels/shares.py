"""Sums over tokens: every program of a kernel has written a share, one launch adds all.

PyTorch's `sum` over the first dim takes 7 microseconds for the few hundred kilobytes that these
are, on an H200; a training step of ViG-T and its adapter has 126 of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, num_programs, power_of_2

TILE = 4096  # numbers that a program has in flight
ROWS = 128
BM = 64  # rows of a tile of `rows_kernel`
COLUMNS = 32  # at least; 128 bytes, what memory hands out at once


@triton.jit
def sum_kernel(p_share, p_out, P, N, BP: tl.constexpr, BN: tl.constexpr):
    """out (N,) = the sum of share (P, N) over P, float32; a program does BN columns."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BP, BN], tl.float32)
    for start in range(0, P, BP):
        rows = start + tl.arange(0, BP)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        b_sum += tl.load(p_share + at, mask=mask, other=0.0)
    tl.store(p_out + cols, tl.sum(b_sum, 0), mask=cols < N)


def sum_shares(share: Tensor) -> Tensor:
    """(P, ...) float32, contiguous, to its sum over P, in an order that is always the same."""
    out = torch.empty(share.shape[1:], dtype=share.dtype, device=share.device)
    programs, numbers = share.shape[0], out.numel()
    rows = min(ROWS, power_of_2(programs))
    cols = min(1024, max(COLUMNS, TILE // rows))
    sum_kernel[(ceil_div(numbers, cols),)](share, out, programs, numbers, BP=rows, BN=cols)
    return out


@triton.jit
def rows_kernel(p_x, p_share, M, N, stride, each, BM: tl.constexpr, BN: tl.constexpr):
    """Share (P, N) of the sum of x (M, N) over M, float32: `each` rows, BN columns a program."""
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BM, BN], tl.float32)
    begin = tl.program_id(0) * each
    end = tl.minimum(begin + each, M)
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        mask = (rows < end)[:, None] & (cols < N)[None, :]
        at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
        b_sum += tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_share + tl.program_id(0) * N + cols, tl.sum(b_sum, 0), mask=cols < N)


def sum_rows(x: Tensor) -> Tensor:
    """(M, N) to its sum over M, (N,) float32, in an order that is always the same."""
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n = x.shape
    width = min(64, power_of_2(n))
    blocks = ceil_div(n, width)
    programs = num_programs(ceil_div(m, 2 * BM), x.device, max(1, 4 // blocks))
    each = ceil_div(ceil_div(m, programs), BM) * BM
    programs = ceil_div(m, each)
    share = torch.empty(programs, n, dtype=torch.float32, device=x.device)
    rows_kernel[(programs, blocks)](x, share, m, n, x.stride(0), each, BM=BM, BN=width)
    return sum_shares(share)
