"""Sums over tokens: every program of a kernel has written a share, one launch adds all.

PyTorch's `sum` over the first dim takes 7 microseconds for the few hundred kilobytes that these
are, on an H200; a training step of ViG-T and its adapter has some 160 of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, num_programs, power_of_2
from mmvig.kernels.launch import await_previous, kernel

MOST = 6  # tensors of one launch
TILE = 4096  # numbers that a program has in flight
ROWS = 128
BM = 64  # rows of a tile of `rows_kernel`
COLUMNS = 32  # at least; 128 bytes, what memory hands out at once


@triton.jit
def go_on(i, at, p, P, N, p_next, P_next, N_next, BN: tl.constexpr):
    """Goes on to the next tensor if block i of columns is behind the last one of this."""
    blocks = tl.cdiv(N, BN)
    if i >= blocks:
        i -= blocks
        at += N
        p, P, N = p_next, P_next, N_next
    return i, at, p, P, N


@kernel(sizes=['P0', 'P1', 'P2', 'P3', 'P4', 'P5', 'N1', 'N2', 'N3', 'N4', 'N5'])
def sum_kernel(
    p_0, p_1, p_2, p_3, p_4, p_5, p_out,
    P0, P1, P2, P3, P4, P5, N0, N1, N2, N3, N4, N5,
    COUNT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums of COUNT tensors (P, N) over P, one after another in out, float32.

    A program does BN columns of one of them.
    """
    await_previous()
    i = tl.program_id(0)
    at, p, P, N = i * 0, p_0, P0, N0
    if COUNT > 1:
        i, at, p, P, N = go_on(i, at, p, P, N, p_1, P1, N1, BN)
    if COUNT > 2:
        i, at, p, P, N = go_on(i, at, p, P, N, p_2, P2, N2, BN)
    if COUNT > 3:
        i, at, p, P, N = go_on(i, at, p, P, N, p_3, P3, N3, BN)
    if COUNT > 4:
        i, at, p, P, N = go_on(i, at, p, P, N, p_4, P4, N4, BN)
    if COUNT > 5:
        i, at, p, P, N = go_on(i, at, p, P, N, p_5, P5, N5, BN)
    cols = i * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BP, BN], tl.float32)
    for start in range(0, P, BP):
        rows = start + tl.arange(0, BP)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        b_sum += tl.load(p + rows[:, None].to(tl.int64) * N + cols[None, :], mask=mask, other=0.0)
    tl.store(p_out + at + cols, tl.sum(b_sum, 0), mask=cols < N)


def sum_shares(*shares: Tensor) -> list[Tensor]:
    """Up to six tensors (P, ...) float32, contiguous, to their sums over P.

    One launch, each sum in an order that is always the same; P and the rest may differ. The sums
    are parts of one tensor.
    """
    counts = [share.shape[0] for share in shares]
    numbers = [share.numel() // p for share, p in zip(shares, counts, strict=True)]
    rows = min(ROWS, power_of_2(max(counts)))
    cols = min(1024, max(COLUMNS, TILE // rows))
    out = torch.empty(sum(numbers), dtype=torch.float32, device=shares[0].device)
    none = MOST - len(shares)
    sum_kernel[(sum(ceil_div(n, cols) for n in numbers),)](
        *shares, *[None] * none, out, *counts, *[0] * none, *numbers, *[0] * none,
        COUNT=len(shares), BP=rows, BN=cols,
    )  # fmt: skip
    parts = [out] if len(shares) == 1 else out.split(numbers)
    return [part.view(share.shape[1:]) for part, share in zip(parts, shares, strict=True)]


@kernel(sizes=['M', 'each'])
def rows_kernel(p_x, p_share, M, N, stride, each, BM: tl.constexpr, BN: tl.constexpr):
    """Share (P, N) of the sum of x (M, N) over M, float32: `each` rows, BN columns a program."""
    await_previous()
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
    return sum_shares(share)[0]
