_base_ = 'vig_t_maskrcnn.py'

model = dict(
    backbone=dict(trunk=dict(arch='small', drop_path_rate=0.2)),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
