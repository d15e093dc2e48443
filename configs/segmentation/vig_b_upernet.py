_base_ = 'vig_t_upernet.py'

model = dict(
    backbone=dict(
        trunk=dict(arch='base', drop_path_rate=0.3), deform_num_heads=12, deform_ratio=0.5
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.80))
