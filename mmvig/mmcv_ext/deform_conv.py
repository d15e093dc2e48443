"""Deformable convolution with and without modulation, on torchvision's kernels."""

import torch
import torchvision  # noqa: F401, registers torch.ops.torchvision
from torch import Tensor

from mmvig.mmcv_ext.numeric import store, wide

_OUTSIDE = 6e4  # pixels; the largest round number that float16 holds


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (arXiv 1703.06211, equation 2), in float32 or wider.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kH, kW).
        offset: (B, 2 * deformable_group * kH * kW, OH, OW), (y, x) of each tap, pixels.
        output: (B, O, OH, OW), written.
        columns, ones: Scratch of mmcv's kernels.
        kW, kH, dW, dH, padW, padH, dilationW, dilationH: Kernel size, stride, padding, dilation.
        group, deformable_group: Groups of the weight and of the offsets.
        im2col_step: Images at a time in mmcv's kernel; torchvision's chooses for itself.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    store(output, _forward(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Writes the gradients of `input` and `offset`; arguments as in the forward.

    torchvision computes the weight's gradient along with these. It is left in `columns`, the
    scratch that mmcv hands to `deform_conv_backward_parameters` right after.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _backward(gradOutput, input, weight, offset, None, None, geometry)
    store(gradInput, grads[0])
    store(gradOffset, grads[2])
    columns.resize_(weight.shape).copy_(grads[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Adds `scale` times the weight's gradient to `gradWeight`; arguments as in the forward."""
    if columns.shape == gradWeight.shape:
        gradWeight.add_(columns, alpha=scale)
        # Used up: another backward pass must not take it for its own.
        columns.resize_(0)
        return
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # The weight's gradient does not depend on the weight, only on its shape.
    grads = _backward(gradOutput, input, gradWeight, offset, None, None, geometry)
    gradWeight.add_(grads[1].to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution (arXiv 1811.11168, equation 1), in float32 or wider.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kernel_h, kernel_w).
        bias: (O,), or empty without `with_bias`.
        offset: (B, 2 * deformable_group * kernel_h * kernel_w, OH, OW), (y, x) of each tap, pixels.
        mask: (B, deformable_group * kernel_h * kernel_w, OH, OW), factor of each tap.
        output: (B, O, OH, OW), written.
        ones, columns: Scratch of mmcv's kernels.
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w: Geometry.
        group, deformable_group: Groups of the weight and of the offsets.
        with_bias: Whether to add `bias`.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = (_leading(t, output.shape[2:]) for t in (offset, mask))
    store(output, _forward(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Writes the five gradients; arguments as in the forward, `grad_bias` only with `with_bias`."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = (_leading(t, grad_output.shape[2:]) for t in (offset, mask))
    grads = _backward(
        grad_output, input, weight, offset, mask, bias if with_bias else None, geometry
    )
    store(grad_input, grads[0])
    store(grad_weight, grads[1])
    # All of them but where only their leading values were read: mmcv hands over zeros.
    _leading(grad_offset, offset.shape[2:]).copy_(grads[2])
    _leading(grad_mask, mask.shape[2:]).copy_(grads[3])
    if with_bias:
        store(grad_bias, grads[4])


def _leading(taps: Tensor, size: torch.Size) -> Tensor:
    """Offsets or mask (B, K, H, W) as mmcv's modulated kernel reads them: (B, K, *size).

    That kernel does not look at H and W. It reads each image's values one after another as if they
    had the output's size, and mmdet's DyHead, whose weights were trained so, gives it larger ones.

    Raises:
        ValueError: Where there are fewer values than the output needs.
    """
    if taps.shape[2:] == size:
        return taps
    channels, needed = taps.shape[1], size.numel()
    if taps.shape[2:].numel() < needed:
        raise ValueError(
            f'offset and mask must be at least as large as the output, {tuple(size)}, '
            f'got {tuple(taps.shape[2:])}'
        )
    return taps.view(len(taps), -1)[:, : channels * needed].view(len(taps), channels, *size)


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> Tensor:
    tensors = _arguments(input, weight, offset, mask, bias)
    return torch.ops.torchvision.deform_conv2d(*tensors, *geometry, mask is not None)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Gradients of input, weight, offset, mask and bias."""
    tensors = _arguments(input, weight, offset, mask, bias)
    grad_output = grad_output.to(tensors[0].dtype).contiguous()
    return torch.ops.torchvision._deform_conv2d_backward(
        grad_output, *tensors, *geometry, mask is not None
    )


def _arguments(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """The tensors as torchvision's operator takes them: a mask it may ignore, always a bias."""
    # A sample at NaN is one outside the image in mmcv, and an access outside of memory in
    # torchvision: a diverged model must not take its process down.
    offset = offset.nan_to_num(nan=_OUTSIDE, posinf=_OUTSIDE, neginf=-_OUTSIDE)
    if mask is None:
        mask = input.new_zeros(len(input), 1)
    if bias is None:
        bias = input.new_zeros(weight.shape[0])
    return wide(input, weight, offset, mask, bias)
