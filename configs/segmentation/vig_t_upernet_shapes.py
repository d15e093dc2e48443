# UperNet, ViG-T with adapter, on the built-in shapes: learns from scratch in minutes on a CPU.
_base_ = [
    '_base_/models/upernet_vig_t_adapter.py',
    '_base_/datasets/shapes_seg.py',
    '_base_/schedules/adamw_160k.py',
    '_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(160, 192)),
    backbone=dict(trunk=dict(drop_path_rate=0.0)),
    decode_head=dict(channels=128, num_classes=9),
    auxiliary_head=dict(channels=64, num_classes=9),
    test_cfg=dict(_delete_=True, mode='whole'),
)
train_cfg = dict(max_iters=400, val_interval=400)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=50, end=400, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=400))
