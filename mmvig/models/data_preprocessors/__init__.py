"""mmdet's and mmseg's data preprocessors, without the waits for the device.

They derive from theirs, which may be absent: their modules are imported when a class is asked for,
by name in a config or as `mmvig.models.data_preprocessors.<class>`.
"""

from mmengine.registry import MODELS

from mmvig.on_demand import register_on_demand

__getattr__ = register_on_demand(
    MODELS,
    __name__,
    {'AsyncDetDataPreprocessor': 'det', 'AsyncSegDataPreProcessor': 'seg'},
)
