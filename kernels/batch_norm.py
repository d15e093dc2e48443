"""Batch norm, and ReLU and max pooling behind it: checks, autograd, dispatch."""

import torch
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import as_pixels, check_devices, form


def batch_norm(
    x: Tensor,
    running: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:
    """Batch norm (arXiv 1502.03167), then on request ReLU and 3x3 max pooling with stride 2.

    On CUDA outside `torch.compile`, which makes kernels of PyTorch's operators itself, what follows
    the norm is part of its pass; float32 inside, differentiable once in training and not at all by
    given statistics, for which PyTorch's operators serve where gradients are wanted. Sums over
    pixels have a fixed order. The input alone is saved, and a byte for each pooled number.

    Args:
        x: (B, C, H, W), channels last in memory, else it is copied.
        running: (C,) each, mean and variance, float32; in training they move.
        weight, bias: (C,).
        training: Whether the norm is by the statistics of x, or else by the running ones.
        momentum: The share of a running statistic that is replaced.
        eps: Added to the variance.
        relu: Whether ReLU follows.
        pool: Whether pooling follows, with padding 1.

    Returns:
        (B, C, H, W) or, pooled, (B, C, (H + 1) // 2, (W + 1) // 2), in the dtype of x.

    Raises:
        ValueError: If shapes or devices do not fit together, or training has one number a channel.
    """
    mean, var = running
    params = dict(mean=mean, var=var, weight=weight, bias=bias)
    _check(x, params)
    if training and x.numel() == x.shape[1]:
        raise ValueError(f'training needs more than one number a channel, got {tuple(x.shape)}')
    args = (momentum, eps, relu, pool)
    has_kernel = form(x, *params.values()) == 'eager' and mean.dtype == var.dtype == torch.float32
    if not has_kernel or (torch.is_grad_enabled() and not training):
        return reference.batch_norm(x, running, weight, bias, training, *args)
    pixels = as_pixels(x).contiguous()
    if training:
        out = _Training.apply(pixels, mean, var, weight, bias, *args)
    else:
        # Imported here since PyTorch builds for the CPU come without Triton.
        from mmvig.kernels.batch_norm_kernels import forward

        out, _ = forward(pixels, [mean, var, weight, bias], eps, relu, pool)
    return out.permute(0, 3, 1, 2)


def _check(x: Tensor, params: dict[str, Tensor]) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if x.ndim != 4:
        raise ValueError(f'x must be (B, C, H, W), got {tuple(x.shape)}')
    for name, p in params.items():
        if p.shape != (x.shape[1],):
            raise ValueError(f'{name} must be ({x.shape[1]},), the channels, got {tuple(p.shape)}')
    check_devices(x, **params)


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        momentum: float,
        eps: float,
        relu: bool,
        pool: bool,
    ) -> Tensor:
        from mmvig.kernels import batch_norm_kernels

        stats = batch_norm_kernels.statistics(x, mean, var, momentum)
        params = [*stats, weight, bias]
        out, tap = batch_norm_kernels.forward(x, params, eps, relu, pool, with_tap=pool)
        ctx.save_for_backward(x, stats, weight, bias, tap)
        ctx.settings = (eps, relu)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        from mmvig.kernels import batch_norm_kernels

        x, stats, weight, bias, tap = ctx.saved_tensors
        dx, sums = batch_norm_kernels.backward(
            x, [*stats, weight, bias], tap, grad.contiguous(), *ctx.settings
        )
        dweight, dbias = sums[0].to(weight.dtype), sums[1].to(bias.dtype)
        return dx, None, None, dweight, dbias, None, None, None, None
