"""Backbones, registered in mmengine's root registry."""

from mmvig.models.backbones.vig import ViG
from mmvig.models.backbones.vig_h import ViGH
from mmvig.models.backbones.vit import TimmViT
from mmvig.models.backbones.vit_adapter import ViTAdapter

__all__ = ['TimmViT', 'ViG', 'ViGH', 'ViTAdapter']
