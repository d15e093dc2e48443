# The paper's baseline: the same adapter around a plain ViT with full attention.
_base_ = 'vig_t_maskrcnn.py'

model = dict(backbone=dict(trunk=dict(type='TimmViT')))
