"""The ViT-Adapter's map of stride 4: what lies behind its products, in inference one kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.kernels import reference
from mmvig.kernels.dispatch import HALVES, as_pixels, check_devices, form
from mmvig.kernels.resized_sum import Norm, resize_ratio, resized_sum


def finest_map(
    x: Tensor,
    y: Tensor,
    project: Tensor,
    tokens: Tensor,
    bias: Tensor,
    norm: Norm,
    eps: float = 1e-5,
) -> Tensor:
    """`shuffle(x) + project(y) + bias + resize(tokens)`, and batch norm by given statistics.

    A transposed conv of 2x2 pixels with stride 2 is a product, x, whose rows are four pixels.
    Resizing is that of `resized_sum`. On CUDA in half precision, without gradients, outside
    `torch.compile`, one kernel: neither the pixels in their order nor the projection, each as large
    as the result, is written. Elsewhere `resized_sum` of both.

    Args:
        x: (B, H / 2, W / 2, 4 * C), contiguous: pixels (0, 0), (0, 1), (1, 0) and (1, 1) of a
            square, C channels each.
        y: (B, CY, H, W), channels last in memory, else it is copied; in the dtype of x.
        project: (C, CY), a linear's weight; in the dtype of x.
        tokens: (B, C, h, w), as y; may be of a wider dtype.
        bias: (C,).
        norm: Running mean, running variance, weight and bias of batch norm, (C,) each.
        eps: Added to the variance.

    Returns:
        (B, C, H, W) in the dtype of x, on CUDA channels last in memory.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    _check(x, y, project, tokens, bias, norm)
    up, down = resize_ratio(y.shape, tokens.shape) or (0, 0)
    half = x.dtype in HALVES
    is_eager = form(x, tokens, bias, *norm) == 'eager' and not torch.is_grad_enabled()
    if not half or not is_eager or down != 1:
        pixels = reference.shuffle(x)
        projected = F.conv2d(y, project[:, :, None, None])
        return resized_sum(pixels, tokens, projected, bias, norm, eps)
    # Imported here since PyTorch builds for the CPU come without Triton.
    from mmvig.kernels.finest_map_kernels import forward

    x, project = x.contiguous(), project.contiguous()
    out = forward(x, as_pixels(y), project, as_pixels(tokens), bias, norm, eps, up)
    return out.permute(0, 3, 1, 2)


def _check(x: Tensor, y: Tensor, project: Tensor, tokens: Tensor, bias: Tensor, norm: Norm) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if y.ndim != 4 or project.ndim != 2 or tokens.ndim != 4:
        raise ValueError(
            f'y {tuple(y.shape)}, project {tuple(project.shape)} and tokens {tuple(tokens.shape)} '
            'must be (B, CY, H, W), (C, CY) and (B, C, h, w)'
        )
    (b, cy, height, width), c = y.shape, project.shape[0]
    expected = dict(
        x=(x, (b, height // 2, width // 2, 4 * c)),
        project=(project, (c, cy)),
        tokens=(tokens, (b, c, *tokens.shape[2:])),
    )
    names = ('bias', 'mean', 'variance', 'weight', 'shift')
    expected |= {name: (p, (c,)) for name, p in zip(names, (bias, *norm), strict=True)}
    for name, (t, shape) in expected.items():
        if t.shape != shape:
            raise ValueError(f'{name} must be {shape}, got {tuple(t.shape)}')
    if height % 2 or width % 2:
        raise ValueError(f'y must have an even height and width, got {height}x{width}')
    if not x.dtype == y.dtype == project.dtype:
        raise ValueError(
            f'x ({x.dtype}), y ({y.dtype}) and project ({project.dtype}) must share a dtype'
        )
    check_devices(x, y=y, project=project, tokens=tokens, bias=bias)
