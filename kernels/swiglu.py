"""SwiGLU's product on the halves of one linear's output: checks, autograd, dispatch."""

import torch
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import as_rows, form, refuse_second_derivative


def swiglu(x: Tensor) -> Tensor:
    """`silu(a) * b` for x = [a, b] along the channels (arXiv 2002.05202, equation 6).

    On CUDA one kernel each way, differentiable once, float32 inside; nothing but x is saved.

    Args:
        x: (..., 2 F), any strides; no copy where the rows are evenly spaced.

    Returns:
        (..., F), contiguous, in the dtype of x.

    Raises:
        ValueError: If x has an odd number of channels or no floating dtype.
    """
    if x.ndim < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f'x must be (..., 2 F) of a floating dtype, got {tuple(x.shape)} of {x.dtype}'
        )
    way = form(x)
    if way == 'plain':
        return reference.swiglu(x)
    rows = as_rows(x)
    out = _Eager.apply(rows) if way == 'eager' else torch.ops.mmvig.swiglu(rows)
    return out.view(*x.shape[:-1], -1)


def _launch(x: Tensor) -> Tensor:
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.swiglu_kernels import forward

    return forward(x)


def _launch_backward(x: Tensor, grad: Tensor) -> Tensor:
    from mmvig.kernels.swiglu_kernels import backward

    return backward(x, grad.contiguous())


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _launch(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return _launch_backward(*ctx.saved_tensors, grad)


@torch.library.custom_op('mmvig::swiglu', mutates_args=(), device_types='cuda')
def _forward(x: Tensor) -> Tensor:
    return _launch(x)


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op('mmvig::swiglu_backward', mutates_args=(), device_types='cuda')
def _backward(x: Tensor, grad: Tensor) -> Tensor:
    return _launch_backward(x, grad)


@_backward.register_fake
def _(x: Tensor, grad: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
    return torch.ops.mmvig.swiglu_backward(*ctx.saved_tensors, grad)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(lambda ctx, *grads: refuse_second_derivative('swiglu'))
