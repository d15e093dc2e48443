"""The import hook behind `import mmcv._ext`.

One finder at the end of `sys.meta_path`: Python's own finders are asked first, so a compiled
`mmcv._ext` always wins, and one that is present but does not load still raises its own error.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_NAME = 'mmcv._ext'
_ORIGIN = 'mmvig.mmcv_ext'


class StandInLoader(Loader):
    """Fills a module with the operators of `mmvig.mmcv_ext.table`."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves it to Python to make an ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        """Imports the operators: here, so that neither `install` nor asking for the spec does."""
        from mmvig.mmcv_ext.missing import missing_op
        from mmvig.mmcv_ext.table import OPS

        module.__doc__ = 'Operators of mmcv without compiled code; see mmvig.mmcv_ext.'
        vars(module).update(OPS)
        module.__getattr__ = missing_op


class StandInFinder(MetaPathFinder):
    """Finds `mmcv._ext`, and nothing else."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Returns the stand-in's spec for `mmcv._ext`, None for every other name."""
        if fullname != _NAME:
            return None
        return ModuleSpec(fullname, StandInLoader(), origin=_ORIGIN)


def install() -> None:
    """Lets `mmcv._ext` be imported where mmcv has no compiled one; does nothing otherwise.

    Imports neither mmcv nor torch, may be called any number of times, and may come after a failed
    import of `mmcv.ops`: Python forgets a failed import, so the next one succeeds.
    """
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


def stands_in() -> bool:
    """Whether `mmcv._ext` is the stand-in, whose RoIAlign takes boxes wider than the maps."""
    return import_module(_NAME).__spec__.origin == _ORIGIN
