# Mask2Former for instances, ViG-T with adapter: mmdet's own config with another backbone.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'

custom_imports = dict(imports=['mmvig'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='ViTAdapter',
        trunk=dict(type='ViG', arch='tiny', drop_path_rate=0.1),
    ),
    panoptic_head=dict(in_channels=[192, 192, 192, 192]),
)
