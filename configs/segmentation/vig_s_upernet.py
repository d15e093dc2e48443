_base_ = 'vig_t_upernet.py'

model = dict(
    backbone=dict(trunk=dict(arch='small', drop_path_rate=0.2)),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.85))
