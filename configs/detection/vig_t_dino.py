# DINO of four scales, ViG-T with adapter: mmdet's own config with another backbone.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

custom_imports = dict(imports=['mmvig'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='ViTAdapter',
        trunk=dict(type='ViG', arch='tiny', drop_path_rate=0.1),
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[192, 192, 192]),
)
