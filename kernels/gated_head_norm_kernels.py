"""Triton kernels and launchers of `gated_head_norm`.

All tensors are (M, H * V): M tokens, H heads of V channels; rows may have any stride. Everything is
computed in float32 and rounded once at the store. A tile is BM tokens of one head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.kernels.grid import ceil_div, num_programs, power_of_2
from mmvig.kernels.launch import await_previous, kernel

TILE = 2048


@triton.jit
def normalize(p, at, mask, V, eps):
    """Rows of V channels with mean square 1, and the factors."""
    b_x = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)[:, None]
    return b_x * b_scale, b_scale


@kernel(sizes=['M'])
def gated_head_norm_kernel(
    p_x, p_local, p_gate, p_bias, p_wx, p_wl, p_out, M, V, x_m, local_m, gate_m, out_m, eps,
    BM: tl.constexpr, BV: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """out = s wx norm(x) + (1 - s) wl norm(local), s = sigmoid(gate + bias); SiLU of it if SILU."""
    await_previous()
    head = tl.program_id(1) * V
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BV)
    mask_v = cols < V
    mask = (rows < M)[:, None] & mask_v[None, :]
    b_row = rows[:, None].to(tl.int64)
    b_col = (head + cols)[None, :]
    b_x, _ = normalize(p_x, b_row * x_m + b_col, mask, V, eps)
    b_local, _ = normalize(p_local, b_row * local_m + b_col, mask, V, eps)
    b_gate = tl.load(p_gate + b_row * gate_m + b_col, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_gate += tl.load(p_bias + head + cols, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    b_s = tl.sigmoid(b_gate)
    b_x *= tl.load(p_wx + cols, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    b_local *= tl.load(p_wl + cols, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    b_out = b_s * b_x + (1 - b_s) * b_local
    if SILU:
        b_out *= tl.sigmoid(b_out)
    tl.store(p_out + b_row * out_m + b_col, b_out.to(p_out.dtype.element_ty), mask=mask)


@kernel(sizes=['M'])
def gated_head_norm_grad_kernel(
    p_x, p_local, p_gate, p_bias, p_wx, p_wl, p_dout, p_dx, p_dlocal, p_dgate, p_dw, p_db, p_out,
    M, V, x_m, local_m, gate_m, dout_m, dgate_m, eps,
    BM: tl.constexpr, BV: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    WITH_OUT: tl.constexpr,
):  # fmt: skip
    """Gradients to x, local and gate, and shares of those to the two weights and bias.

    And the forward's result, if WITH_OUT. All but gate's are contiguous.

    Program (p, h) takes each num_programs-th tile of head h; shares are (programs, H, 2, V) of the
    weights and (programs, H, V) of the bias.
    """
    await_previous()
    head = tl.program_id(1) * V
    width = tl.num_programs(1) * V
    cols = tl.arange(0, BV)
    mask_v = cols < V
    b_col = (head + cols)[None, :]
    b_wx = tl.load(p_wx + cols, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    b_wl = tl.load(p_wl + cols, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        b_bias = tl.load(p_bias + head + cols, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    b_dwx = tl.zeros([BM, BV], tl.float32)
    b_dwl = tl.zeros([BM, BV], tl.float32)
    b_dbias = tl.zeros([BM, BV], tl.float32)
    for start in range(tl.program_id(0) * BM, M, tl.num_programs(0) * BM):
        rows = start + tl.arange(0, BM)
        mask = (rows < M)[:, None] & mask_v[None, :]
        b_row = rows[:, None].to(tl.int64)
        b_x, b_scale_x = normalize(p_x, b_row * x_m + b_col, mask, V, eps)
        b_l, b_scale_l = normalize(p_local, b_row * local_m + b_col, mask, V, eps)
        b_gate = tl.load(p_gate + b_row * gate_m + b_col, mask=mask, other=0.0).to(tl.float32)
        b_d = tl.load(p_dout + b_row * dout_m + b_col, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_gate += b_bias
        b_s = tl.sigmoid(b_gate)
        b_difference = b_wx * b_x - b_wl * b_l
        at = b_row * width + b_col
        b_out = b_s * b_difference + b_wl * b_l
        if SILU:
            b_t = tl.sigmoid(b_out)
            b_d *= b_t * (1 + b_out * (1 - b_t))
            b_out *= b_t
        if WITH_OUT:
            tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=mask)
        b_ds = b_d * b_s
        b_dl = b_d - b_ds
        b_dgate = b_ds * (1 - b_s) * b_difference
        tl.store(p_dgate + b_row * dgate_m + b_col, b_dgate.to(p_dgate.dtype.element_ty), mask=mask)
        b_dbias += b_dgate
        b_dwx += b_ds * b_x
        b_dwl += b_dl * b_l
        b_e = b_ds * b_wx
        b_e = b_scale_x * (b_e - b_x * (tl.sum(b_e * b_x, 1) / V)[:, None])
        tl.store(p_dx + at, b_e.to(p_dx.dtype.element_ty), mask=mask)
        b_e = b_dl * b_wl
        b_e = b_scale_l * (b_e - b_l * (tl.sum(b_e * b_l, 1) / V)[:, None])
        tl.store(p_dlocal + at, b_e.to(p_dlocal.dtype.element_ty), mask=mask)
    at = tl.program_id(0) * width + head
    tl.store(p_dw + 2 * at + cols, tl.sum(b_dwx, 0), mask=mask_v)
    tl.store(p_dw + 2 * at + V + cols, tl.sum(b_dwl, 0), mask=mask_v)
    tl.store(p_db + at + cols, tl.sum(b_dbias, 0), mask=mask_v)


def _tile(v: int) -> dict[str, int]:
    block = power_of_2(v)
    return dict(BM=max(1, TILE // block), BV=block)


def forward(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    weight_x: Tensor,
    weight_local: Tensor,
    silu: bool,
    eps: float,
) -> Tensor:
    """(M, H * V) tensors, rows of any stride, to the same, contiguous."""
    (m, c), v = x.shape, weight_x.shape[0]
    out = x.new_empty(m, c)
    tile = _tile(v)
    gated_head_norm_kernel[(ceil_div(m, tile['BM']), c // v)](
        x, local, gate, bias, weight_x, weight_local, out, m, v,
        x.stride(0), local.stride(0), gate.stride(0), c, eps,
        **tile, HAS_BIAS=bias is not None, SILU=silu,
    )  # fmt: skip
    return out


def backward(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    weight_x: Tensor,
    weight_local: Tensor,
    dout: Tensor,
    silu: bool,
    eps: float,
    out: Tensor | None = None,
    dgate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to x, local, gate; shares (P * H, 2, V) to the weights, (P, H * V) to the bias.

    Contiguous, but for dgate, which may be given, with rows of any stride. Out (M, H * V), if
    given, is filled with the forward's result, so that nobody has to keep it.
    """
    (m, c), v = x.shape, weight_x.shape[0]
    dgate = gate.new_empty(m, c) if dgate is None else dgate
    grads = (x.new_empty(m, c), local.new_empty(m, c), dgate)
    tile = _tile(v)
    heads = c // v
    programs = num_programs(ceil_div(m, tile['BM']), x.device, max(1, 6 // heads))
    dw = torch.empty(programs * heads, 2, v, dtype=torch.float32, device=x.device)
    db = torch.empty(programs, c, dtype=torch.float32, device=x.device)
    gated_head_norm_grad_kernel[(programs, heads)](
        x, local, gate, bias, weight_x, weight_local, dout, *grads, dw, db, out, m, v,
        x.stride(0), local.stride(0), gate.stride(0), dout.stride(0), dgate.stride(0), eps,
        **tile, HAS_BIAS=bias is not None, SILU=silu, WITH_OUT=out is not None,
    )  # fmt: skip
    return (*grads, dw, db)
