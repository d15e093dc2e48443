# Mask R-CNN, ViG-T with adapter, on the built-in shapes: learns from scratch in minutes on a CPU.
_base_ = [
    '_base_/models/maskrcnn_vig_t_adapter.py',
    '_base_/datasets/shapes_instance.py',
    '_base_/schedules/adamw_1x.py',
    '_base_/default_runtime.py',
]

model = dict(
    backbone=dict(trunk=dict(drop_path_rate=0.0)),
    neck=dict(out_channels=64),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32, 64]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=8),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=8),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
train_cfg = dict(max_epochs=1, val_interval=1)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3), paramwise_cfg=dict(layer_decay_rate=1.0), clip_grad=dict(max_norm=1.0)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', begin=0, T_max=1, end=1, by_epoch=True, convert_to_iter_based=True
    ),
]
default_hooks = dict(logger=dict(interval=10))
