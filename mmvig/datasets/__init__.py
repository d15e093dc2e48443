"""Data sets: the built-in *shapes*, CamVid, and checks of any data that a config names.

The dataset classes derive from mmdet's and mmseg's, either of which may be absent: their modules
are imported when a class is asked for, by name in a config or as `mmvig.datasets.<class>`.
"""

from mmengine.registry import DATASETS

from mmvig.datasets.checks import check_data
from mmvig.datasets.one_buffer import one_buffer_collate
from mmvig.datasets.packed_masks import PackedMasks, PackMasks
from mmvig.datasets.shapes_files import ShapesSpec, ensure_shapes
from mmvig.on_demand import register_on_demand

__all__ = [
    'PackMasks',
    'PackedMasks',
    'ShapesSpec',
    'check_data',
    'ensure_shapes',
    'one_buffer_collate',
]

__getattr__ = register_on_demand(
    DATASETS,
    __name__,
    {
        'ShapesDetDataset': 'shapes_det',
        'ShapesSegDataset': 'shapes_seg',
        'CamVidDataset': 'camvid',
    },
)
