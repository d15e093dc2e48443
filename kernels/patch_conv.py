"""A conv of few channels and large windows, as in a patch embedding: checks, autograd, dispatch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import HALVES, as_pixels, check_devices, form
from mmvig.kernels.grid import ceil_div
from mmvig.kernels.products import wide_product

ALIGNMENT = 8  # numbers; matrix products want rows of 16 bytes


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """A conv as one product: the windows, each a row, times the weights.

    On CUDA in half precision, for images that want no gradient, outside `torch.compile`. cuDNN
    takes 377 microseconds for 256 images of 224 pixels, 9x9 windows with stride 8 and 96 channels
    on an H200, and 86 before to widen the images from 3 to 8 channels.

    Args:
        x: (B, CIN, H, W), channels last in memory, else it is copied.
        weight: (C, CIN, height, width), in any floating dtype; it is rounded to that of x.
        bias: (C,), likewise.
        stride: Pixels from one window to the next.
        padding: Rows and columns of zeros around the image.

    Returns:
        (B, C, OH, OW) in the dtype of x, on CUDA channels last in memory.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f'x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (B, CIN, H, W) and '
            '(C, CIN, height, width)'
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must be ({weight.shape[0]},), got {tuple(bias.shape)}')
    if any(n + 2 * padding < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)):
        raise ValueError(
            f'x {tuple(x.shape)} with {padding} zeros around is smaller than a window of '
            f'{weight.shape[2]}x{weight.shape[3]}'
        )
    check_devices(x, weight=weight, bias=bias)
    if not has_kernel(x):
        return reference.patch_conv(x, weight, bias, stride, padding)
    return _Eager.apply(x, weight, bias, stride, padding).permute(0, 3, 1, 2)


def has_kernel(x: Tensor) -> bool:
    """Whether a call with x runs as a product."""
    half = x.dtype in HALVES
    return half and form(x) == 'eager' and not (torch.is_grad_enabled() and x.requires_grad)


def windows(x: Tensor, kernel_size: tuple[int, int], stride: int, padding: int) -> Tensor:
    """x (B, CIN, H, W) to rows (B, OH, OW, K): CIN x height x width numbers each, then zeros."""
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.patch_conv_kernels import gather

    width = _row_length(x.shape[1], kernel_size)
    return gather(as_pixels(x).contiguous(), kernel_size, stride, padding, width)


def as_matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A conv's weight (C, CIN, height, width) as (C, K) in a dtype, to be multiplied with rows."""
    width = _row_length(weight.shape[1], weight.shape[2:])
    return F.pad(weight.flatten(1).to(dtype), (0, width - weight[0].numel()))


def _row_length(channels: int, kernel_size: tuple[int, int]) -> int:
    return ceil_div(channels * kernel_size[0] * kernel_size[1], ALIGNMENT) * ALIGNMENT


class _Eager(torch.autograd.Function):
    """Gathers windows again for the backward pass, which costs less than keeping them would."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: int,
        padding: int,
    ) -> Tensor:
        """To (B, OH, OW, C)."""
        ctx.save_for_backward(x)
        ctx.settings = (weight.shape[2:], stride, padding)
        ctx.shape, ctx.dtypes = weight.shape, (weight.dtype, bias.dtype)
        rows = windows(x, *ctx.settings)
        matrix = as_matrix(weight, x.dtype).t()
        out = torch.addmm(bias.to(x.dtype), rows.flatten(0, 2), matrix)
        return out.view(*rows.shape[:3], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        from mmvig.kernels.shares import sum_rows

        (x,) = ctx.saved_tensors
        rows = windows(x, *ctx.settings).flatten(0, 2)
        grad = grad.reshape(-1, grad.shape[-1])
        dweight = wide_product(grad.t(), rows, ctx.dtypes[0])[:, : ctx.shape[1:].numel()]
        return None, dweight.reshape(ctx.shape), sum_rows(grad).to(ctx.dtypes[1]), None, None
