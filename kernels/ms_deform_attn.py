"""Multi-scale deformable attention: checks and dispatch."""

from torch import Tensor

from mmvig.kernels import reference


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention; arguments and result as in `reference.ms_deform_attn`."""
    return reference.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
