_base_ = 'maskrcnn_fpn.py'

model = dict(
    backbone=dict(
        type='ViTAdapter',
        trunk=dict(type='ViG', arch='tiny', drop_path_rate=0.1),
        deform_num_heads=6,
        token_maps='last',
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
