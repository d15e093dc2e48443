"""The *shapes* data set for mmseg."""

from mmseg.datasets import BaseSegDataset

from mmvig.datasets.shapes import CLASSES, PALETTE
from mmvig.datasets.shapes_files import GeneratedShapes


class ShapesSegDataset(GeneratedShapes, BaseSegDataset):
    """Background and eight kinds of shapes, drawn on first use; see `GeneratedShapes`.

    Background is class 0 and learned like the others; no pixel is ignored.
    """

    METAINFO = {
        'classes': ('background', *CLASSES),
        'palette': [[0, 0, 0], *(list(colour) for colour in PALETTE)],
    }
