"""The wheel and the sdist: what is in them, and that they work away from the checkout."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from mmengine.fileio import load

ROOT = Path(__file__).parents[1]
NOT_SOURCES = (
    *('.*', '*.egg-info', '*venv*', '__pycache__'),
    *('build', 'data', 'demo_out', 'dist', 'work_dirs'),
)


def run_python(*args: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree: Path, kind: str, out: Path) -> Path:
    """Calls the build backend as pip does, without a build environment: it needs no network."""
    out.mkdir(parents=True, exist_ok=True)
    code = f'from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})'
    run_python('-c', code, cwd=tree)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope='module')
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that was built before, when it held two more files."""
    tree = tmp_path_factory.mktemp('tree') / 'mmvig'
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    stale = [tree / 'mmvig' / 'stale.py', tree / 'configs' / 'detection' / 'stale.py']
    for path in stale:
        path.touch()
    names = wheel_names(build(tree, 'wheel', tree.parent / 'first'))
    assert {'mmvig/stale.py', 'mmvig/.mim/configs/detection/stale.py'} <= names
    for path in stale:
        path.unlink()
    return tree


@pytest.fixture(scope='module')
def wheel(tree: Path) -> Path:
    return build(tree, 'wheel', tree.parent / 'wheel')


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str) -> set[str]:
    """The files of a source folder, relative to the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts and '.mim' not in path.parts
    }


def test_wheel_holds_the_package_kernels_configs_and_tools(wheel: Path) -> None:
    names = {name for name in wheel_names(wheel) if '.dist-info/' not in name}
    modules = {name for name in sources('kernels') if name.endswith('.py')}
    expected = sources('mmvig') | {f'mmvig/{name}' for name in modules}
    expected |= {f'mmvig/.mim/{name}' for name in sources('configs') | sources('tools')}
    expected |= {'mmvig/.mim/model-index.yml'}
    assert names == expected


def test_wheel_installs_no_other_top_level_name(wheel: Path) -> None:
    tops = {name.partition('/')[0] for name in wheel_names(wheel)}
    assert {top for top in tops if not top.endswith('.dist-info')} == {'mmvig'}


def test_wheel_requires_no_mm_package_unless_asked(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith('METADATA'))
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith('Requires-Dist: ')]
    core = [line for line in required if 'extra ==' not in line]
    assert any('torch>=2.4' in line for line in core)
    assert any('triton' in line and 'Linux' in line for line in core)
    for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg'):
        assert not [line for line in core if name in line]
        assert [line for line in required if f' onedl-{name}' in line and 'extra ==' in line]


def test_sdist_builds_the_same_wheel(tree: Path, wheel: Path) -> None:
    sdist = build(tree, 'sdist', tree.parent / 'sdist')
    unpacked = tree.parent / 'unpacked'
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter='data')
    (folder,) = unpacked.iterdir()
    assert not (folder / 'mmvig' / '.mim').exists()
    again = build(folder, 'wheel', tree.parent / 'wheel_of_sdist')
    assert wheel_names(again) == wheel_names(wheel)


def test_editable_install_links_what_the_wheel_copies(tree: Path, wheel: Path) -> None:
    for name in ('editable', 'editable_again'):
        build(tree, 'editable', tree.parent / name)
    mim = tree / 'mmvig' / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).is_symlink()
        assert (mim / name).resolve() == (tree / name).resolve()


SMOKE = """
from pathlib import Path

import mmvig
import mmvig.kernels
from mmengine.config import Config
from mmengine.registry import MODELS

for module in (mmvig, mmvig.kernels):
    assert Path(module.__file__).is_relative_to({site!r}), module.__file__
configs = Path(mmvig.__file__).parent / '.mim' / 'configs'
for name in ('detection/vig_t_maskrcnn.py', 'segmentation/vig_t_upernet.py'):
    MODELS.build(Config.fromfile(configs / name).model.backbone)
"""


def test_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / 'site'
    pip = ('-m', 'pip', '--disable-pip-version-check', 'install', '--no-index', '--no-deps')
    run_python(*pip, '--target', str(site), str(wheel), cwd=tmp_path)
    run_python('-c', SMOKE.format(site=str(site)), cwd=tmp_path, PYTHONPATH=str(site))
    tool = site / 'mmvig' / '.mim' / 'tools' / 'train.py'
    out = run_python(str(tool), '--help', cwd=tmp_path, PYTHONPATH=str(site))
    assert '--auto-scale-lr' in out


def test_model_index_names_every_config() -> None:
    index = load(ROOT / 'model-index.yml')
    models = [model for path in index['Import'] for model in load(ROOT / path)['Models']]
    configs = [model['Config'] for model in models]
    assert sorted(configs) == sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('configs/*/*.py'))
    for model in models:
        assert model['Name'] == Path(model['Config']).stem


def test_version_is_the_distribution_s(wheel: Path) -> None:
    version = runpy.run_path(str(ROOT / 'mmvig' / 'version.py'))['__version__']
    assert wheel.name == f'mmvig-{version}-py3-none-any.whl'


def test_a_checkout_without_kernels_says_what_to_do(tmp_path: Path) -> None:
    """As Python finds it in the root of a checkout, where mmvig is installed by `pip install .`."""
    code = (
        'import importlib.util as util, sys\n'
        'util.find_spec = lambda name: None\n'
        'try: import mmvig\n'
        'except ImportError as error: print(error)'
    )
    said = run_python('-c', code, cwd=tmp_path)
    assert 'checkout without its kernels' in said and 'start Python in another folder' in said
