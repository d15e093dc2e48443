"""Cost of a model without running it: multiply-adds and parameters, by part."""

from mmvig.analysis.flops import Cost, count_backbone, count_model

__all__ = ['Cost', 'count_backbone', 'count_model']
