"""What answers for `mmcv._ext` where mmcv was installed without compiled operators.

`install()` is all that the rest of the package needs. The operators are plain functions with the
names, arguments and in-place outputs of mmcv's C++ ones; `table.py` lists them.
"""

from mmvig.mmcv_ext.finder import install, stands_in

__all__ = ['install', 'stands_in']
