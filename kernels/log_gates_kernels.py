"""Triton kernels and launchers of `log_gates`: logsigmoid(low @ weight.T + bias) / 16.

low is (M, R), rows of any stride, R a power of 2 of at least 16; weight is (C, R), bias (C,). The
gates are (M, C / 2) for each of two directions, the channels of the second behind the first's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, num_programs, power_of_2
from mmvig.kernels.launch import await_previous, kernel
from mmvig.kernels.shares import sum_shares

NORMALIZER = tl.constexpr(16)
BM = 64
# channels of a direction that a program does, of the gates and of the gradients
MAX_BC, GRAD_MAX_BC = 64, 128


@triton.jit
def project(
    p_low, p_weight, p_bias, rows, cols, mask_m, mask_c, low_m,
    R: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of low @ weight.T + bias, float32."""
    ranks = tl.arange(0, R)
    at = rows[:, None].to(tl.int64) * low_m + ranks[None, :]
    b_low = tl.load(p_low + at, mask=mask_m[:, None], other=0.0).to(OP)
    at = cols[None, :] * R + ranks[:, None]
    b_weight = tl.load(p_weight + at, mask=mask_c[None, :], other=0.0).to(OP)
    b_bias = tl.load(p_bias + cols, mask=mask_c, other=0.0).to(tl.float32)
    return tl.dot(b_low, b_weight, input_precision=PRECISION) + b_bias[None, :]


@kernel(sizes=['M'])
def log_gates_kernel(
    p_low, p_weight, p_bias, p_fwd, p_bwd, M, HALF, low_m,
    R: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, 2, blocks of the channels of a direction)."""
    await_previous()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(2) * BC + tl.arange(0, BC)
    mask_m, mask_c = rows < M, cols < HALF
    if tl.program_id(1) == 1:
        p_weight += HALF * R
        p_bias += HALF
        p_fwd = p_bwd
    b_z = project(
        p_low, p_weight, p_bias, rows, cols, mask_m, mask_c, low_m, R, OP, PRECISION
    )  # fmt: skip
    b_gate = tl.minimum(b_z, 0.0) - tl.log(1 + tl.exp(-tl.abs(b_z)))
    at = rows[:, None].to(tl.int64) * HALF + cols[None, :]
    b_gate = (b_gate / NORMALIZER).to(p_fwd.dtype.element_ty)
    tl.store(p_fwd + at, b_gate, mask=mask_m[:, None] & mask_c[None, :])


@kernel(sizes=['M'])
def log_gates_grad_kernel(
    p_low, p_weight, p_bias, p_dfwd, p_dbwd, p_dlow, p_share, M, HALF, low_m, dfwd_m, dbwd_m,
    R: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Shares of the gradients: to low (2 blocks of channels, M, R); to weight and bias.

    Those to weight and bias are (programs 0, R + 1, C), the bias last. Program (p, d, c) takes each
    num_programs-th tile of tokens.
    """
    await_previous()
    direction = tl.program_id(1)
    cols = tl.program_id(2) * BC + tl.arange(0, BC)
    ranks = tl.arange(0, R)
    mask_c = cols < HALF
    if direction == 1:
        p_weight += HALF * R
        p_bias += HALF
        p_dfwd = p_dbwd
        dfwd_m = dbwd_m
    p_dlow += (direction * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * M * R
    b_weight = tl.load(
        p_weight + cols[:, None] * R + ranks[None, :], mask=mask_c[:, None], other=0.0
    ).to(OP)
    b_dweight = tl.zeros([R, BC], tl.float32)
    b_dbias = tl.zeros([BM, BC], tl.float32)
    for start in range(tl.program_id(0) * BM, M, tl.num_programs(0) * BM):
        rows = start + tl.arange(0, BM)
        mask_m = rows < M
        b_z = project(
            p_low, p_weight, p_bias, rows, cols, mask_m, mask_c, low_m, R, OP, PRECISION
        )  # fmt: skip
        at = rows[:, None].to(tl.int64) * dfwd_m + cols[None, :]
        b_d = tl.load(p_dfwd + at, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        b_d = b_d.to(tl.float32) / NORMALIZER * tl.sigmoid(-b_z)
        b_dbias += b_d
        b_d = b_d.to(OP)
        b_dlow = tl.dot(b_d, b_weight, input_precision=PRECISION)
        at = rows[:, None].to(tl.int64) * R + ranks[None, :]
        tl.store(p_dlow + at, b_dlow.to(p_dlow.dtype.element_ty), mask=mask_m[:, None])
        # loaded turned, not turned: a transposed left operand is miscompiled on Hopper
        at = rows[None, :].to(tl.int64) * low_m + ranks[:, None]
        b_turned = tl.load(p_low + at, mask=mask_m[None, :], other=0.0).to(OP)
        b_dweight = tl.dot(b_turned, b_d, b_dweight, input_precision=PRECISION)
    p_share += tl.program_id(0) * (R + 1) * 2 * HALF + direction * HALF
    at = ranks[:, None] * 2 * HALF + cols[None, :]
    tl.store(p_share + at, b_dweight, mask=mask_c[None, :])
    tl.store(p_share + R * 2 * HALF + cols, tl.sum(b_dbias, 0), mask=mask_c)


def _settings(low: Tensor, half: int, most: int) -> dict:
    half_precision = low.dtype != torch.float32
    op = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(low.dtype, tl.float32)
    bc = max(16, min(most, power_of_2(half)))
    return dict(R=low.shape[1], BM=BM, BC=bc, OP=op, PRECISION='tf32' if half_precision else 'ieee')


def forward(low: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The log gates of both directions, (M, C / 2) each."""
    m, half = low.shape[0], weight.shape[0] // 2
    fwd = torch.empty(m, half, dtype=dtype, device=low.device)
    bwd = torch.empty_like(fwd)
    settings = _settings(low, half, MAX_BC)
    grid = (ceil_div(m, BM), 2, ceil_div(half, settings['BC']))
    log_gates_kernel[grid](low, weight, bias, fwd, bwd, m, half, low.stride(0), **settings)
    return fwd, bwd


def backward(
    low: Tensor, weight: Tensor, bias: Tensor, dfwd: Tensor, dbwd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to low, float32, and shares (P, R + 1, C) of those to weight, turned, and bias."""
    (m, r), half = low.shape, weight.shape[0] // 2
    settings = _settings(low, half, GRAD_MAX_BC)
    blocks = ceil_div(half, settings['BC'])
    programs = num_programs(ceil_div(m, BM), low.device, max(1, 4 // blocks))
    dlow = torch.empty(2 * blocks, m, r, dtype=torch.float32, device=low.device)
    share = torch.empty(programs, r + 1, 2 * half, dtype=torch.float32, device=low.device)
    log_gates_grad_kernel[(programs, 2, blocks)](
        low, weight, bias, dfwd, dbwd, dlow, share, m, half,
        low.stride(0), dfwd.stride(0), dbwd.stride(0), **settings,
    )  # fmt: skip
    return sum_shares(dlow)[0], share
