"""Residual sum and the norm of it, RMSNorm or LayerNorm: checks, autograd, dispatch."""

import torch
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import check_devices, form, refuse_second_derivative, run, working_dtype


def residual_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = x + keep * y` and its norm over the channels, in one pass.

    Without bias the norm is RMSNorm (arXiv 1910.07467), with bias LayerNorm (arXiv 1607.06450).
    On CUDA one kernel forward and one backward, differentiable once, float32 inside; s alone is
    saved. The sum over tokens in the gradients of weight and bias has a fixed order.

    Args:
        x: (B, ..., C), the residual stream; a mixed precision network has it in float32.
        y: (B, ..., C), what a branch adds, may be of another dtype; or None.
        weight, bias: (C,).
        eps: Added to the variance (LayerNorm) or the mean square.
        keep: (B,), a factor of each sample of y, which drop path draws; or None.
        dtype: Of the norm; autocast's where None, which spares the next layer its cast, else x's.

    Returns:
        s, which is x where y is None, in the wider dtype of x and y; and the norm. Contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    _check(x, y, weight, bias, keep)
    dtype = working_dtype(x) if dtype is None else dtype
    way = form(x, y, weight)
    if way == 'plain':
        return reference.residual_norm(x, y, weight, bias, eps, keep, dtype)
    x = x.contiguous()
    y = None if y is None else y.contiguous()
    if way == 'eager':
        return run(_Eager, _launch, x, y, weight, bias, eps, keep, dtype)
    total, out = torch.ops.mmvig.residual_norm(x, y, weight, bias, eps, keep, dtype)
    return (x if y is None else total), out


def _check(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, keep: Tensor | None
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    c = x.shape[-1]
    if y is not None and y.shape != x.shape:
        raise ValueError(f'y {tuple(y.shape)} must have the shape of x {tuple(x.shape)}')
    for name, p in (('weight', weight), ('bias', bias)):
        if p is not None and p.shape != (c,):
            raise ValueError(f'{name} must be ({c},), the channels of x, got {tuple(p.shape)}')
    if keep is not None and (y is None or keep.shape != x.shape[:1]):
        raise ValueError(
            f'keep must be ({x.shape[0]},), one for each sample of y, got {tuple(keep.shape)}'
        )
    check_devices(x, y=y, weight=weight, bias=bias, keep=keep)


def _launch(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.residual_norm_kernels import forward

    return forward(x, y, keep, weight, bias, eps, dtype)


def _launch_backward(
    total: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    grad_total: Tensor | None,
    grad: Tensor,
    eps: float,
    y_dtype: torch.dtype | None,
    center: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    from mmvig.kernels.residual_norm_kernels import backward
    from mmvig.kernels.shares import sum_shares

    grad_total = None if grad_total is None else grad_total.contiguous()
    args = (total, keep, weight, grad_total, grad.contiguous(), eps, y_dtype, center)
    dx, dy, share = backward(*args)
    return dx, dy, sum_shares(share)[0]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        keep: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        total, out = _launch(x, y, weight, bias, eps, keep, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, keep)
        ctx.settings = (eps, None if y is None else y.dtype, bias is not None)
        # x, too, is handed on: the kernel adds the gradient that comes back, else autograd would
        return (x.view_as(x) if y is None else total), out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_total: Tensor | None, grad: Tensor | None
    ) -> tuple:
        total, weight, keep = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(total)
        dx, dy, shares = _launch_backward(total, weight, keep, grad_total, grad, *ctx.settings)
        return dx, dy, shares[0], (shares[1] if ctx.settings[2] else None), None, None, None


@torch.library.custom_op('mmvig::residual_norm', mutates_args=(), device_types='cuda')
def _forward(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total, out = _launch(x, y, weight, bias, eps, keep, dtype)
    return (x.new_empty(0) if y is None else total), out


@_forward.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=dtype)
    if y is None:
        return x.new_empty(0), out
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)), out


@torch.library.custom_op('mmvig::residual_norm_backward', mutates_args=(), device_types='cuda')
def _backward(
    total: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    grad_total: Tensor | None,
    grad: Tensor,
    eps: float,
    y_dtype: torch.dtype | None,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (total, weight, keep, grad_total, grad, eps, y_dtype, center)
    dx, dy, shares = _launch_backward(*args)
    return dx, (dx.new_empty(0) if dy is None else dy), shares


@_backward.register_fake
def _(
    total: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    grad_total: Tensor | None,
    grad: Tensor,
    eps: float,
    y_dtype: torch.dtype | None,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = total.new_empty(total.shape)
    dy = total.new_empty(0) if y_dtype is None else total.new_empty(total.shape, dtype=y_dtype)
    shares = total.new_empty(2 if center else 1, total.shape[-1], dtype=torch.float32)
    return dx, dy, shares


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, y, weight, bias, eps, keep, _ = inputs
    ctx.save_for_backward(x if y is None else output[0], weight, keep)
    ctx.settings = (eps, None if y is None else y.dtype, bias is not None)


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad_total: Tensor, grad: Tensor
) -> tuple:
    total, weight, keep = ctx.saved_tensors
    _, y_dtype, center = ctx.settings
    grad_total = None if y_dtype is None else grad_total
    dx, dy, shares = torch.ops.mmvig.residual_norm_backward(
        total, weight, keep, grad_total, grad, *ctx.settings
    )
    dy = None if y_dtype is None else dy
    return dx, dy, shares[0], (shares[1] if center else None), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(lambda ctx, *grads: refuse_second_derivative('residual_norm'))
