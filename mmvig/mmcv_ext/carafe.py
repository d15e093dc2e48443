"""CARAFE: upsampling with a kernel of its own for every output pixel.

Shape legend: B images, G groups, C channels of a group, K x K kernel, H x W input, S scale.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.mmcv_ext.numeric import wide


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """CARAFE (arXiv 1905.02188, equation 3), in float32 or wider.

    Args:
        features: (B, G * C, H, W).
        masks: (B, G * K * K, S * H, S * W), the kernels.
        rfeatures: Like features, written: mmcv hands it to the backward in place of them.
        routput, rmasks: Scratch of mmcv's kernels.
        output: (B, G * C, S * H, S * W), written.
        kernel_size, group_size, scale_factor: K, G, S.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Writes the gradients of `features` and `masks`; the other `r...` are mmcv's scratch."""
    carafe_naive_backward(
        top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor
    )


def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """The same as `carafe_forward`, without scratch."""
    padded, kernels = _operands(features, masks, kernel_size, group_size, scale_factor)
    out = _split(output.to(padded.dtype), group_size, scale_factor).zero_()
    for tap, window in _windows(padded, kernel_size):
        out.addcmul_(window[..., None, :, None], kernels[:, :, tap, None])
    output.copy_(out.reshape(output.shape))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Writes the gradients of `features` and `masks`; arguments as in the forward."""
    padded, kernels = _operands(features, masks, kernel_size, group_size, scale_factor)
    grads = _split(top_grad.to(padded.dtype), group_size, scale_factor)
    to_padded, to_kernels = torch.zeros_like(padded), torch.empty_like(kernels)
    windows = zip(_windows(padded, kernel_size), _windows(to_padded, kernel_size), strict=True)
    for (tap, window), (_, to_window) in windows:
        to_window += (grads * kernels[:, :, tap, None]).sum((4, 6))
        to_kernels[:, :, tap] = (grads * window[..., None, :, None]).sum(2)
    radius = kernel_size // 2
    inner = to_padded[..., radius : radius + features.shape[2], radius : radius + features.shape[3]]
    bottom_grad.copy_(inner.reshape(bottom_grad.shape))
    mask_grad.copy_(to_kernels.reshape(mask_grad.shape))


def _operands(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> tuple[Tensor, Tensor]:
    """Padded features (B, G, C, H + K - 1, W + K - 1), kernels (B, G, K * K, H, S, W, S)."""
    features, masks = wide(features, masks)
    padded = F.pad(features.unflatten(1, (group_size, -1)), (kernel_size // 2,) * 4)
    return padded, _split(masks, group_size, scale_factor)


def _split(maps: Tensor, group_size: int, scale_factor: int) -> Tensor:
    """(B, G * C, S * H, S * W) -> (B, G, C, H, S, W, S)."""
    maps = maps.unflatten(3, (-1, scale_factor)).unflatten(2, (-1, scale_factor))
    return maps.unflatten(1, (group_size, -1))


def _windows(padded: Tensor, kernel_size: int) -> Iterator[tuple[int, Tensor]]:
    """For each tap of the kernel, its number and the view (B, G, C, H, W) that it meets.

    One tap at a time: all together they would hold K * K copies of the features.
    """
    height, width = (n - kernel_size + 1 for n in padded.shape[3:])
    for row in range(kernel_size):
        for column in range(kernel_size):
            view = padded[..., row : row + height, column : column + width]
            yield row * kernel_size + column, view
