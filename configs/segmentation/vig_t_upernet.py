# UperNet, ViG-T with adapter, ADE20K 160k. The recipe starts from ImageNet weights:
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '_base_/models/upernet_vig_t_adapter.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/adamw_160k.py',
    '_base_/default_runtime.py',
]

optim_wrapper = dict(optimizer=dict(lr=1.2e-4), paramwise_cfg=dict(layer_decay_rate=0.95))
