# Mask2Former, ViG-T with adapter, ADE20K 160k.
_base_ = [
    '_base_/models/mask2former_head.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/adamw_160k.py',
    '_base_/default_runtime.py',
]

# its parts are mmdet's
custom_imports = dict(imports=['mmvig', 'mmdet.models'], allow_failed_imports=False)
optim_wrapper = dict(optimizer=dict(lr=1.2e-4), paramwise_cfg=dict(layer_decay_rate=0.95))
