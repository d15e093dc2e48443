# Overfits some hundred images in COCO's layout, from scratch, in minutes on one GPU: a check of
# data and labels before a long run. AP is taken on the training images themselves.
_base_ = 'vig_t_maskrcnn.py'

data_root = 'data/coco100/'
train_data = dict(
    data_root=data_root,
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='PackMasks'),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',  # one long epoch: the learning rate falls by iteration
        times=27,
        dataset=dict(
            type='CocoDataset',
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=train_pipeline,
            **train_data,
        ),
    ),
)
val_dataloader = dict(num_workers=8, dataset=train_data)
val_evaluator = dict(ann_file=data_root + train_data['ann_file'])
test_dataloader = val_dataloader
test_evaluator = val_evaluator

model = dict(backbone=dict(trunk=dict(drop_path_rate=0.0)))
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=dict(enabled=False),  # bfloat16 has float32's range
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        T_max=1,
        end=1,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(checkpoint=dict(save_best=None))
