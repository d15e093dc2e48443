"""GPU operators of mmvig; imports torch and triton only. Imported as `mmvig.kernels`."""

from mmvig.kernels.bigla import bidirectional_gla
from mmvig.kernels.ms_deform_attn import ms_deform_attn

__all__ = ['bidirectional_gla', 'ms_deform_attn']
