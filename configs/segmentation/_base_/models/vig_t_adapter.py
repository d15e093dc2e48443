# Preprocessor and backbone that every segmentor here starts from.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='AsyncSegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='ViTAdapter',
        trunk=dict(type='ViG', arch='tiny', drop_path_rate=0.1),
        deform_num_heads=6,
        token_maps='each',
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
