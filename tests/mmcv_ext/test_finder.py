"""The import hook, each case in a fresh interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_MMVIG = Path(__file__).parents[2] / 'mmvig'


def _python(code: str, path: Path | None = None) -> str:
    env = dict(os.environ)
    if path is not None:
        env['PYTHONPATH'] = os.pathsep.join([str(path), env.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _fake_mmcv(root: Path, ext: str) -> Path:
    """A package named mmcv with an `_ext` of its own, a compiled one for all that Python knows."""
    package = root / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / '_ext.py').write_text(ext)
    return root


# The hook as `import mmvig` installs it, without mmvig's networks and what they import.
INSTALL = f"""
import sys, types
sys.modules.setdefault('mmvig', types.ModuleType('mmvig')).__path__ = [{str(_MMVIG)!r}]
from mmvig.mmcv_ext.finder import install
install()
"""


def test_hook_imports_neither_mmcv_nor_torch() -> None:
    code = INSTALL + "print(sorted({'mmcv', 'torch', 'torchvision'} & set(sys.modules)))"
    assert _python(code) == '[]'


def test_import_of_mmvig_is_enough() -> None:
    """After a failed import of the operators, too; and for what mmengine and mmcv ask."""
    code = """
try:
    import mmcv.ops
except ImportError as error:
    assert error.name == 'mmcv._ext', error
    import mmvig
import importlib.util, mmcv._ext, mmcv.ops, pkgutil, torch
from mmengine.utils.dl_utils.misc import mmcv_full_available
assert len(mmcv.ops.nms(torch.rand(0, 4), torch.rand(0), 0.5)) == 2
assert mmcv_full_available()
assert getattr(pkgutil, 'find_loader', importlib.util.find_spec)('mmcv._ext') is not None
print(importlib.util.find_spec('mmcv._ext').origin, mmcv._ext.__spec__.origin)
"""
    assert _python(code).split()[-2:] == ['mmvig.mmcv_ext', 'mmvig.mmcv_ext']


def test_installs_once_and_answers_for_one_name_only() -> None:
    code = """
install()
from mmvig.mmcv_ext.finder import StandInFinder
found = [f for f in sys.meta_path if isinstance(f, StandInFinder)]
assert found == sys.meta_path[-1:], sys.meta_path
assert not any(found[0].find_spec(name) for name in ('mmcv._ext2', 'mmcv', '_ext', 'mmcv.ops'))
"""
    _python(INSTALL + code)


def test_compiled_ext_wins(tmp_path: Path) -> None:
    root = _fake_mmcv(tmp_path, 'compiled = True')
    code = INSTALL + 'import mmcv._ext as e; print(e.compiled, hasattr(e, "nms"), e.__file__)'
    compiled, has_nms, file = _python(code, root).split()
    assert (compiled, has_nms) == ('True', 'False') and Path(file) == root / 'mmcv' / '_ext.py'


def test_broken_compiled_ext_keeps_its_own_error(tmp_path: Path) -> None:
    root = _fake_mmcv(tmp_path, 'raise ImportError("libcudart.so.99: cannot open")')
    code = 'try:\n    import mmcv._ext\nexcept ImportError as error:\n    print(error)'
    assert _python(INSTALL + code, root) == 'libcudart.so.99: cannot open'


def test_ext_imported_before_stays(tmp_path: Path) -> None:
    root = _fake_mmcv(tmp_path, 'compiled = True')
    code = 'import mmcv._ext as first' + INSTALL + 'import mmcv._ext as e; print(e is first)'
    assert _python(code, root) == 'True'


def test_missing_operator_names_itself_and_the_remedy() -> None:
    import mmcv._ext as ext
    from mmcv.ops import knn

    assert callable(ext.knn_forward) and ext.knn_forward.__name__ == 'knn_forward'
    with pytest.raises(NotImplementedError, match=r"'upfirdn2d' .* Install onedl-mmcv .* mmcv "):
        ext.upfirdn2d(1, up=2)
    assert knn is not None  # imports fine
    for name in ('__path__', '__wrapped__', '_private'):
        assert not hasattr(ext, name)
