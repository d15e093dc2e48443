# Segmenter's linear head (arXiv 2105.05633): classes of patches from plain ViG-T, stride 16.
_base_ = [
    '_base_/models/vig_t_adapter.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/adamw_160k.py',
    '_base_/default_runtime.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ViG', arch='tiny', drop_path_rate=0.1),
    decode_head=dict(
        type='FCNHead',
        in_channels=192,
        channels=192,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1.2e-4), paramwise_cfg=dict(layer_decay_rate=0.95))
