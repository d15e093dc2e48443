# RetinaNet, ViG-H-T, COCO 1x in Swin's recipe.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '_base_/datasets/coco_detection.py',
    '_base_/schedules/swin_1x.py',
    '_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True, type='ViGH', arch='tiny', drop_path_rate=0.2, out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
