# Mask2Former, ViG-H-T, ADE20K 160k.
_base_ = 'vig_t_mask2former.py'

model = dict(
    backbone=dict(_delete_=True, type='ViGH', arch='tiny', drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
