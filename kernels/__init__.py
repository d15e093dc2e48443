"""GPU operators of mmvig; imports torch and triton only. Imported as `mmvig.kernels`."""

from mmvig.kernels.batch_norm import batch_norm
from mmvig.kernels.bigla import bidirectional_gla
from mmvig.kernels.channels_last import channels_last
from mmvig.kernels.depthwise_conv import depthwise_conv
from mmvig.kernels.finest_map import finest_map
from mmvig.kernels.gated_head_norm import gated_head_norm
from mmvig.kernels.log_gates import log_gates
from mmvig.kernels.ms_deform_attn import ms_deform_attn
from mmvig.kernels.patch_conv import patch_conv
from mmvig.kernels.residual_norm import residual_norm
from mmvig.kernels.resized_sum import resized_sum
from mmvig.kernels.sampling_points import sampling_points
from mmvig.kernels.stem_conv import stem_conv
from mmvig.kernels.swiglu import swiglu
from mmvig.kernels.swiglu_product import swiglu_product

__all__ = [
    'batch_norm',
    'bidirectional_gla',
    'channels_last',
    'depthwise_conv',
    'finest_map',
    'gated_head_norm',
    'log_gates',
    'ms_deform_attn',
    'patch_conv',
    'residual_norm',
    'resized_sum',
    'sampling_points',
    'stem_conv',
    'swiglu',
    'swiglu_product',
]
