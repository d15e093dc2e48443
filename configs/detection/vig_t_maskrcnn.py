# Mask R-CNN, ViG-T with adapter, COCO 1x. The recipe starts from ImageNet weights:
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '_base_/models/maskrcnn_vig_t_adapter.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/adamw_1x.py',
    '_base_/default_runtime.py',
]
