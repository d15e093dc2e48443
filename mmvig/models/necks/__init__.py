"""Necks, registered in mmengine's root registry."""

from mmvig.models.necks.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ['SimpleFeaturePyramid']
