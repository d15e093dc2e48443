# The paper's second baseline: 14x14 windows, every third block with full attention.
_base_ = 'vit_s_maskrcnn.py'

model = dict(backbone=dict(trunk=dict(window_size=14)))
