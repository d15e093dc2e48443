"""mmvig: the ViG backbone, its adapter and its kernels for mmdet and mmseg.

`custom_imports = dict(imports=['mmvig'])` in a config is all that a pipeline needs: the import
answers for `mmcv._ext` where mmcv has no compiled operators, and registers everything in
mmengine's root registries, where every OpenMMLab library looks.
"""

from importlib.util import find_spec

if find_spec('mmvig.kernels') is None:
    raise ImportError(
        f'{__path__[0]} is a checkout without its kernels, found instead of the installed mmvig: '
        "start Python in another folder, or install with pip install -e '.[mm]'"
    )

from mmvig import mmcv_ext
from mmvig.version import __version__

mmcv_ext.install()  # before anything below imports mmcv's operators

from mmvig import datasets, engine, models  # noqa: E402

__all__ = ['__version__', 'datasets', 'engine', 'mmcv_ext', 'models']
