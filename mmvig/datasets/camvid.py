"""CamVid, eleven classes, for mmseg."""

from mmseg.datasets import BaseSegDataset


class CamVidDataset(BaseSegDataset):
    """CamVid: 360 x 480 frames of driving, eleven classes (Brostow et al. 2009; SegNet's choice).

    In mmseg layout: images `img_dir/{train,val}/*.jpg`, label maps `ann_dir/{train,val}/*.png`
    with ids 0 to 10 in the order below and 255 where a pixel is ignored.
    """

    METAINFO = {
        'classes': (
            'Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol', 'Fence', 'Car',
            'Pedestrian', 'Bicyclist',
        ),
        'palette': [
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
            [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0],
            [0, 128, 192],
        ],
    }  # fmt: skip
