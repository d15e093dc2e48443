"""Networks: `layers` on the kernels, `backbones` on the layers."""

from mmvig.models.backbones import TimmViT, ViG, ViGH, ViTAdapter

__all__ = ['TimmViT', 'ViG', 'ViGH', 'ViTAdapter']
