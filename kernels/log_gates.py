"""BiGLA's log gates from the low-rank vector that all heads share: checks, autograd, dispatch."""

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

RANKS = (16, 32, 64, 128)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the log gates in a network of this dtype.

    bfloat16 for bfloat16: rounding the gates adds 4e-4 at most to the relative error of BiGLA's
    output and gradients, beside 2.5e-3 by the rounding of q, k and v, since the errors in a sum of
    gates are independent. Not float16 for float16, whose subnormal range begins at gates of -6e-5.
    """
    if dtype == torch.bfloat16:
        return dtype
    return torch.promote_types(dtype, torch.float32)


def log_gates(
    low: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`logsigmoid(low @ weight.T + bias) / 16`, halved: the log gates of both directions.

    Source: arXiv 2312.06635, section 4.4, and arXiv 2405.18425, section 3.2. On CUDA one kernel
    forward and one backward, differentiable once, the product in the dtype of low with float32
    sums, all else in float32; only the inputs are saved. Sums over tokens, in the gradients of
    weight and bias, have a fixed order. Under autocast low is cast to its dtype.

    Args:
        low: (..., R), any strides; no copy where the rows are evenly spaced.
        weight: (C, R).
        bias: (C,).
        dtype: Of the gates; `gate_dtype` of low's where None.

    Returns:
        (..., C / 2), contiguous, for the forward and the backward direction.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != low.shape[-1]:
        raise ValueError(
            f'weight must be (C, R), C even, R the channels of low {tuple(low.shape)}, got '
            f'{tuple(weight.shape)}'
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must be ({weight.shape[0]},), got {tuple(bias.shape)}')
    check_devices(low, weight=weight, bias=bias)
    low = low.to(working_dtype(low))
    dtype = gate_dtype(low.dtype) if dtype is None else dtype
    way = form(low, weight, bias)
    if way == 'plain' or weight.shape[1] not in RANKS:
        return reference.log_gates(low, weight, bias, dtype)
    args = (as_rows(low), weight, bias, dtype)
    fwd, bwd = _Eager.apply(*args) if way == 'eager' else torch.ops.mmvig.log_gates(*args)
    shape = (*low.shape[:-1], -1)
    return fwd.view(shape), bwd.view(shape)


def _launch(low: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.log_gates_kernels import forward

    return forward(low, weight.contiguous(), bias, dtype)


def _launch_backward(
    low: Tensor, weight: Tensor, bias: Tensor, grad_fwd: Tensor, grad_bwd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from mmvig.kernels.log_gates_kernels import backward
    from mmvig.kernels.shares import sum_shares

    grads = (as_rows(grad_fwd), as_rows(grad_bwd))
    dlow, share = backward(low, weight.contiguous(), bias, *grads)
    (sums,) = sum_shares(share)
    return dlow.to(low.dtype), sums[:-1].t(), sums[-1]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        low: Tensor,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(low, weight, bias)
        return _launch(low, weight, bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple:
        return *_launch_backward(*ctx.saved_tensors, *grads), None


@torch.library.custom_op('mmvig::log_gates', mutates_args=(), device_types='cuda')
def _forward(
    low: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _launch(low, weight, bias, dtype)


@_forward.register_fake
def _(low: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (low.shape[0], weight.shape[0] // 2)
    return low.new_empty(shape, dtype=dtype), low.new_empty(shape, dtype=dtype)


@torch.library.custom_op('mmvig::log_gates_backward', mutates_args=(), device_types='cuda')
def _backward(
    low: Tensor, weight: Tensor, bias: Tensor, grad_fwd: Tensor, grad_bwd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dlow, dweight, dbias = _launch_backward(low, weight, bias, grad_fwd, grad_bwd)
    return dlow, dweight.contiguous(), dbias.clone()  # outputs share no memory


@_backward.register_fake
def _(
    low: Tensor, weight: Tensor, bias: Tensor, grad_fwd: Tensor, grad_bwd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [weight.new_empty(x.shape, dtype=torch.float32) for x in (weight, bias)]
    return low.new_empty(low.shape), *grads


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple:
    return *torch.ops.mmvig.log_gates_backward(*ctx.saved_tensors, *grads), None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(lambda ctx, *grads: refuse_second_derivative('log_gates'))
