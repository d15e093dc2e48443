# Cascade Mask R-CNN, ViG-H-T, COCO 1x in Swin's recipe.
_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/swin_1x.py',
    '_base_/default_runtime.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ViGH', arch='tiny', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
