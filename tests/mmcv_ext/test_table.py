"""The table of operators against mmcv itself: signatures, call sites, importability."""

import inspect
import re
from pathlib import Path

import mmcv
import mmcv._ext
import mmcv.ops
import pytest

from mmvig.mmcv_ext.table import OPS

_BINDINGS = Path(mmcv.__file__).parent / 'ops' / 'csrc' / 'pytorch' / 'pybind.cpp'
# Here mmcv's binding names its arguments in another order than its function takes them.
_MISNAMED = {'roi_align_rotated_backward'}


def test_signatures_equal_those_of_the_bindings() -> None:
    if not _BINDINGS.exists():
        pytest.skip(f'this mmcv ships no sources: no {_BINDINGS}')
    definitions = re.findall(r'm\.def\(\s*"(\w+)"(.*?)\);', _BINDINGS.read_text(), re.DOTALL)
    bound = {name: re.findall(r'py::arg\("(\w+)"\)', rest) for name, rest in definitions}
    assert len(bound) > 80
    assert OPS.keys() - bound.keys() <= {'line_nms_forward'}  # new in OneDL's mmcv
    for name, op in OPS.items():
        if name in bound and name not in _MISNAMED:
            assert list(inspect.signature(op).parameters) == bound[name], name


def test_module_serves_the_table() -> None:
    for name, op in OPS.items():
        assert getattr(mmcv._ext, name) is op


def test_every_name_of_mmcv_ops_is_there() -> None:
    for name in mmcv.ops.__all__:
        assert getattr(mmcv.ops, name) is not None


def test_compiler_answers_are_honest() -> None:
    assert mmcv.ops.get_compiler_version().startswith('none')
    assert mmcv.ops.get_compiling_cuda_version() == 'not available'


def test_documented_table_is_complete() -> None:
    text = (Path(__file__).parents[2] / 'docs' / 'mmcv_ops.md').read_text()
    documented = set(re.findall(r'`(\w+)`', text))
    assert OPS.keys() <= documented, sorted(OPS.keys() - documented)
