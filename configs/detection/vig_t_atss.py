# ATSS, ViG-T with adapter: mmdet's own config with another backbone, and AdamW.
_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmvig'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='ViTAdapter',
        trunk=dict(type='ViG', arch='tiny', drop_path_rate=0.1),
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[192, 192, 192], start_level=0),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
)
