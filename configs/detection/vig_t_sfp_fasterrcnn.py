# Faster R-CNN, plain ViG-T with ViTDet's simple feature pyramid in place of adapter and FPN.
_base_ = 'vig_t_fasterrcnn.py'

model = dict(
    backbone=dict(_delete_=True, type='ViG', arch='tiny', drop_path_rate=0.1),
    neck=dict(
        _delete_=True, type='SimpleFeaturePyramid', in_channels=192, out_channels=256, num_outs=5
    ),
)
