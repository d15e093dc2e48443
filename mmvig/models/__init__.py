"""Networks: `layers` on the kernels, `backbones` on the layers, the rest beside them."""

from mmvig.models import data_preprocessors, rcnn
from mmvig.models.backbones import TimmViT, ViG, ViGH, ViTAdapter
from mmvig.models.necks import SimpleFeaturePyramid

__all__ = [
    'SimpleFeaturePyramid',
    'TimmViT',
    'ViG',
    'ViGH',
    'ViTAdapter',
    'data_preprocessors',
    'rcnn',
]
