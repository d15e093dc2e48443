"""Multi-scale deformable attention, on `mmvig.kernels`."""

import torch
from torch import Tensor

from mmvig.kernels import ms_deform_attn
from mmvig.mmcv_ext.numeric import store


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention; shapes as in `mmvig.kernels.ms_deform_attn`.

    `im2col_step`, which splits the batch in mmcv's kernel, changes no result and is not needed.
    """
    with torch.autocast(value.device.type, enabled=False):
        return ms_deform_attn(
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
        )


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Writes the three gradients: the operator's own backward, without a second forward."""
    grads = torch.ops.mmvig.ms_deform_attn_backward(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        grad_output.to(value.dtype),
        True,
        True,
    )
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        store(target, grad)
