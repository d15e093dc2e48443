# ATSS, ViG-H-T.
_base_ = 'vig_t_atss.py'

model = dict(
    backbone=dict(
        _delete_=True, type='ViGH', arch='tiny', drop_path_rate=0.2, out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
