# UperNet, ViG-T with adapter, CamVid from scratch: 2000 iterations at batch 16, one GPU.
_base_ = [
    '_base_/models/upernet_vig_t_adapter.py',
    '_base_/datasets/camvid.py',
    '_base_/schedules/adamw_160k.py',
    '_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(352, 480)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
    test_cfg=dict(_delete_=True, mode='whole'),
)
train_cfg = dict(max_iters=2000, val_interval=1000)
optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=dict(enabled=False),  # bfloat16 has float32's range
    optimizer=dict(type='FusedAdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=200, end=2000, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=1000))
