_base_ = 'upernet_vig_t_adapter.py'

model = dict(
    backbone=dict(_delete_=True, type='ViGH', arch='tiny', drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(_delete_=True, mode='whole'),
)
