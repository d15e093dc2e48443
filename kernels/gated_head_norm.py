"""The mixer's last step, two norms per head blended by a gate: checks, autograd, dispatch."""

import torch
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import (
    as_rows,
    check_devices,
    form,
    refuse_second_derivative,
    working_dtype,
)


def gated_head_norm(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None = None,
    silu: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """`s * rms_norm(x) + (1 - s) * rms_norm(local)` with `s = sigmoid(gate + gate_bias)`, per head.

    Source: arXiv 2405.18425, section 3.3 (locality injection). On CUDA one kernel forward and one
    backward, differentiable once, float32 inside; only the inputs are saved. Sums over tokens, in
    the gradients of weights and bias, have a fixed order. Under autocast x, local and gate are cast
    to its dtype; weights and bias keep theirs.

    Args:
        x, local, gate: (..., H * V), of one dtype, any strides; no copy where rows are evenly
            spaced.
        weight_x, weight_local: (V,), shared by all heads.
        gate_bias: (H * V,) or None; here rather than in the linear before, which then can share a
            matrix product with others that have none.
        silu: Whether SiLU is applied to the result.
        eps: Added to the mean squares.

    Returns:
        (..., H * V), contiguous, in the dtype of x.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = working_dtype(x)
        x, local, gate = x.to(dtype), local.to(dtype), gate.to(dtype)
    _check(x, local, gate, weight_x, weight_local, gate_bias)
    way = form(x, weight_x)
    if way == 'plain':
        args = (x, local, gate, weight_x, weight_local, gate_bias, silu, eps)
        return reference.gated_head_norm(*args)
    rows = (as_rows(x), as_rows(local), as_rows(gate))
    args = (*rows, weight_x, weight_local, gate_bias, silu, eps)
    out = _Eager.apply(*args) if way == 'eager' else torch.ops.mmvig.gated_head_norm(*args)
    return out.view(x.shape)


def _check(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None,
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    for name, t in (('local', local), ('gate', gate)):
        if t.shape != x.shape:
            raise ValueError(f'{name} {tuple(t.shape)} must have the shape of x {tuple(x.shape)}')
    v = weight_x.numel()
    if weight_x.ndim != 1 or weight_local.shape != weight_x.shape or x.shape[-1] % v:
        raise ValueError(
            f'weight_x {tuple(weight_x.shape)} and weight_local {tuple(weight_local.shape)} must '
            f'both be (V,), V a divisor of the channels of x {tuple(x.shape)}'
        )
    if gate_bias is not None and gate_bias.shape != x.shape[-1:]:
        raise ValueError(
            f'gate_bias must be ({x.shape[-1]},), the channels of x, got {tuple(gate_bias.shape)}'
        )
    check_devices(
        x, local=local, gate=gate, weight_x=weight_x, weight_local=weight_local, gate_bias=gate_bias
    )
    if not x.dtype == local.dtype == gate.dtype:
        raise ValueError(
            f'x, local, gate must share a dtype, got {x.dtype}, {local.dtype}, {gate.dtype}'
        )


def _launch(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None,
    silu: bool,
    eps: float,
) -> Tensor:
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.gated_head_norm_kernels import forward

    return forward(x, local, gate, gate_bias, weight_x, weight_local, silu, eps)


def _launch_backward(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None,
    grad: Tensor,
    silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, local, gate, both weights (2, V), and the gate's bias (H * V)."""
    from mmvig.kernels.gated_head_norm_kernels import backward
    from mmvig.kernels.shares import sum_shares

    args = (x, local, gate, gate_bias, weight_x, weight_local, grad.contiguous(), silu, eps)
    *grads, dw, db = backward(*args)
    return (*grads, *sum_shares(dw, db))


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, *args: Tensor | bool | float | None
    ) -> Tensor:
        ctx.save_for_backward(*args[:6])
        ctx.settings = args[6:]
        return _launch(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        saved = ctx.saved_tensors  # once: recomputed tensors are given out a single time
        *grads, weights, bias = _launch_backward(*saved, grad, *ctx.settings)
        bias = None if saved[5] is None else bias
        return *grads, weights[0], weights[1], bias, None, None


@torch.library.custom_op('mmvig::gated_head_norm', mutates_args=(), device_types='cuda')
def _forward(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None,
    silu: bool,
    eps: float,
) -> Tensor:
    return _launch(x, local, gate, weight_x, weight_local, gate_bias, silu, eps)


@_forward.register_fake
def _(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None,
    silu: bool,
    eps: float,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op('mmvig::gated_head_norm_backward', mutates_args=(), device_types='cuda')
def _backward(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None,
    grad: Tensor,
    silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *grads, bias = _launch_backward(
        x, local, gate, weight_x, weight_local, gate_bias, grad, silu, eps
    )
    return (*grads, bias.clone())  # outputs of an operator share no memory


@_backward.register_fake
def _(
    x: Tensor,
    local: Tensor,
    gate: Tensor,
    weight_x: Tensor,
    weight_local: Tensor,
    gate_bias: Tensor | None,
    grad: Tensor,
    silu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [x.new_empty(x.shape) for _ in range(3)]
    weights = weight_x.new_empty(2, weight_x.shape[0], dtype=torch.float32)
    return (*grads, weights, x.new_empty(x.shape[1], dtype=torch.float32))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    saved = ctx.saved_tensors  # once: recomputed tensors are given out a single time
    *grads, weights, bias = torch.ops.mmvig.gated_head_norm_backward(*saved, grad, *ctx.settings)
    bias = None if saved[5] is None else bias
    return *grads, weights[0], weights[1], bias, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(lambda ctx, *grads: refuse_second_derivative('gated_head_norm'))
