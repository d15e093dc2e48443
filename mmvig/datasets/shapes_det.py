"""The *shapes* data set for mmdet."""

from mmdet.datasets import CocoDataset

from mmvig.datasets.shapes import CLASSES, PALETTE
from mmvig.datasets.shapes_files import GeneratedShapes


class ShapesDetDataset(GeneratedShapes, CocoDataset):
    """Eight kinds of shapes with instance masks, drawn on first use; see `GeneratedShapes`."""

    METAINFO = {'classes': CLASSES, 'palette': [*PALETTE]}
