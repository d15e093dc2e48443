"""Registering classes whose modules import mmdet or mmseg, either of which may be absent."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from mmengine.registry import Registry


def register_on_demand(
    registry: Registry, package: str, modules: Mapping[str, str]
) -> Callable[[str], type]:
    """Registers classes under their names without importing them.

    Args:
        registry: Where configs look for them.
        package: The package's name.
        modules: The module of each class, relative to the package.

    Returns:
        A `__getattr__` for the package: the classes are its attributes, too.
    """

    def find(name: str) -> type:
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return getattr(import_module(f'{package}.{modules[name]}'), name)

    for name in modules:
        registry.register_module(name=name, module=_builder(name, find))
    return find


def _builder(name: str, find: Callable[[str], type]) -> Callable[..., Any]:
    def build(**kwargs: Any) -> Any:
        return find(name)(**kwargs)

    build.__name__ = build.__qualname__ = name
    return build
