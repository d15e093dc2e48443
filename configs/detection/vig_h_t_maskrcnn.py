# Mask R-CNN, ViG-H-T, COCO 1x in Swin's recipe. It starts from ImageNet weights:
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '_base_/models/maskrcnn_vig_h_t.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/swin_1x.py',
    '_base_/default_runtime.py',
]
