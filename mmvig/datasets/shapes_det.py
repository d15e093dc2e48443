"""The *shapes* data set for mmdet."""

from mmdet.datasets import CocoDataset

from .shapes import CLASSES, PALETTE
from .shapes_files import GeneratedShapes


class ShapesDetDataset(GeneratedShapes, CocoDataset):
    """Eight kinds of shapes with instance masks, drawn on first use; see `GeneratedShapes`."""

    METAINFO = {'classes': CLASSES, 'palette': [*PALETTE]}
