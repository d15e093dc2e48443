"""A conv of few channels, as a stem begins, and batch norm behind: checks, autograd, dispatch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import HALVES, as_pixels, check_devices, form
from mmvig.kernels.resized_sum import NO_NORM, Norm

MAX_CHANNELS = 3  # of the input, so that a window has at most 32 numbers


def stem_conv(
    x: Tensor, weight: Tensor, norm: Norm | None = None, eps: float = 1e-5, relu: bool = False
) -> Tensor:
    """A 3x3 conv with stride 2 and padding 1; on request batch norm by given statistics, ReLU.

    On CUDA in half precision, for images of at most 3 channels that want no gradient, outside
    `torch.compile` one kernel, where cuDNN's takes about ten times as long as the result takes to
    be written; the gradient to the weights is cuDNN's. With a norm that is so without gradients;
    with them PyTorch's batch norm follows.

    Args:
        x: (B, CIN, H, W), channels last in memory, else it is copied.
        weight: (C, CIN, 3, 3), in any floating dtype; it is rounded to that of x.
        norm: Running mean, running variance, weight and bias of batch norm, (C,) each; or None.
        eps: Added to the variance.
        relu: Whether ReLU follows.

    Returns:
        (B, C, (H + 1) // 2, (W + 1) // 2) in the dtype of x, on CUDA channels last in memory.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f'x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (B, CIN, H, W) and '
            '(C, CIN, 3, 3)'
        )
    names = ('mean', 'variance', 'scale', 'shift')
    params = dict(zip(names, norm or NO_NORM, strict=True))
    for name, p in params.items():
        if p is not None and p.shape != (weight.shape[0],):
            raise ValueError(f'{name} must be ({weight.shape[0]},), got {tuple(p.shape)}')
    check_devices(x, weight=weight, **params)
    half = x.dtype in HALVES and x.shape[1] <= MAX_CHANNELS
    wants_grad = torch.is_grad_enabled()
    if not half or form(x, weight, *params.values()) != 'eager' or (wants_grad and x.requires_grad):
        return reference.stem_conv(x, weight, norm, eps, relu)
    later = wants_grad and (norm is not None or relu)
    pixels = as_pixels(x).contiguous()
    if later or norm is None:
        out = _Eager.apply(pixels, weight, relu and not later)
    else:
        # Imported here since PyTorch builds for the CPU come without Triton.
        from mmvig.kernels.stem_conv_kernels import forward

        out = forward(pixels, weight.contiguous(), norm, eps, relu)
    out = out.permute(0, 3, 1, 2)
    if later:
        out = out if norm is None else F.batch_norm(out, *norm, False, 0.0, eps)
        out = F.relu(out) if relu else out
    return out


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, relu: bool
    ) -> Tensor:
        from mmvig.kernels.stem_conv_kernels import forward

        ctx.save_for_backward(x, weight)
        return forward(x, weight.contiguous(), NO_NORM, 0.0, relu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        half = weight.to(dtype=x.dtype, memory_format=torch.channels_last)
        grad, x = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
        settings = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        _, dweight, _ = torch.ops.aten.convolution_backward(grad, x, half, None, *settings)
        return None, dweight.to(weight.dtype), None
