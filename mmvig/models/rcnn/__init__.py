"""Parts of mmdet's two-stage detectors that work on a whole batch and keep boxes in float32.

They derive from mmdet's, which may be absent: their modules are imported when a class is asked
for, by name in a config or as `mmvig.models.rcnn.<class>`.
"""

from mmengine.registry import MODELS

from mmvig.on_demand import register_on_demand

__getattr__ = register_on_demand(
    MODELS,
    __name__,
    {
        'BatchedRPNHead': 'rpn_head',
        'BatchedRoIHead': 'roi_head',
        'Float32RoIExtractor': 'roi_extractor',
        'PackedMaskHead': 'mask_head',
    },
)
