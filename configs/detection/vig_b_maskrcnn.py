_base_ = 'vig_t_maskrcnn.py'

model = dict(
    backbone=dict(
        trunk=dict(arch='base', drop_path_rate=0.3), deform_num_heads=12, deform_ratio=0.5
    ),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
