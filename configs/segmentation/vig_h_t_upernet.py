# UperNet, ViG-H-T, ADE20K 160k in Swin's recipe. It starts from ImageNet weights:
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '_base_/models/upernet_vig_h_t.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/swin_160k.py',
    '_base_/default_runtime.py',
]
