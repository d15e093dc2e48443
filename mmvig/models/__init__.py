"""Networks: `layers` on the kernels, `backbones` on the layers, `necks` and `rcnn` beside them."""

from mmvig.models import rcnn
from mmvig.models.backbones import TimmViT, ViG, ViGH, ViTAdapter
from mmvig.models.necks import SimpleFeaturePyramid

__all__ = ['SimpleFeaturePyramid', 'TimmViT', 'ViG', 'ViGH', 'ViTAdapter', 'rcnn']
