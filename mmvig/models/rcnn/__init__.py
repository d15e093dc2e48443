"""Parts of mmdet's two-stage detectors that work on a whole batch and keep boxes in float32.

They derive from mmdet's, which may be absent: their modules are imported when a class is asked
for, by name in a config or as `mmvig.models.rcnn.<class>`.
"""

from mmengine.registry import MODELS, TASK_UTILS

from mmvig.on_demand import register_on_demand

_CODERS = {'AsyncDeltaXYWHBBoxCoder': 'bbox_coder'}
_find_coder = register_on_demand(TASK_UTILS, __name__, _CODERS)
_find_model = register_on_demand(
    MODELS,
    __name__,
    {
        'BatchedBBoxHead': 'bbox_head',
        'BatchedRPNHead': 'rpn_head',
        'BatchedRoIHead': 'roi_head',
        'Float32RoIExtractor': 'roi_extractor',
        'PackedMaskHead': 'mask_head',
    },
)


def __getattr__(name: str) -> type:
    return _find_coder(name) if name in _CODERS else _find_model(name)
