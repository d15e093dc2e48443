"""Data sets: the built-in *shapes*, CamVid, and checks of any data that a config names.

The dataset classes derive from mmdet's and mmseg's, either of which may be absent: their modules
are imported when a class is asked for, by name in a config or as `mmvig.datasets.<class>`.
"""

from importlib import import_module
from typing import Any

from mmengine.registry import DATASETS

from mmvig.datasets.checks import check_data
from mmvig.datasets.shapes_files import ShapesSpec, ensure_shapes

_MODULES = {
    'ShapesDetDataset': 'shapes_det',
    'ShapesSegDataset': 'shapes_seg',
    'CamVidDataset': 'camvid',
}

__all__ = ['ShapesSpec', 'check_data', 'ensure_shapes']


def __getattr__(name: str) -> type:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)


def _register(name: str) -> None:
    """Register a dataset class under its name without importing it."""

    def build(**kwargs: Any) -> Any:
        return __getattr__(name)(**kwargs)

    build.__name__ = build.__qualname__ = name
    DATASETS.register_module(name=name, module=build)


for _name in _MODULES:
    _register(_name)
