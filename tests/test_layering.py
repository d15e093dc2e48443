"""Imports go one way: kernels <- layers <- backbones <- mmvig <- tools, tests."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a module imports from its own layer or a lower one. A module belongs to the
# layer with the longest name that it starts with.
LAYERS = {
    'mmvig.kernels': 0,
    'mmvig.models.layers': 1,
    'mmvig.models.utils': 1,
    'mmvig.checkpoint': 2,
    'mmvig.models.backbones': 3,
    'mmvig': 4,
}
# Imported when one of their classes is asked for by name, and not before.
ON_DEMAND = {
    'mmvig.datasets.camvid',
    'mmvig.datasets.shapes_det',
    'mmvig.datasets.shapes_seg',
    'mmvig.models.data_preprocessors.det',
    'mmvig.models.data_preprocessors.seg',
    'mmvig.models.rcnn.bbox_coder',
    'mmvig.models.rcnn.bbox_head',
    'mmvig.models.rcnn.mask_head',
    'mmvig.models.rcnn.roi_extractor',
    'mmvig.models.rcnn.roi_head',
    'mmvig.models.rcnn.rpn_head',
}
FILES = {
    **{f'mmvig.kernels.{path.stem}': path for path in (ROOT / 'kernels').glob('*.py')},
    **{
        '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
        for path in (ROOT / 'mmvig').rglob('*.py')
        if '.mim' not in path.parts
    },
}
modules = pytest.mark.parametrize('module', sorted(FILES))


def imports(module: str, *, top_level: bool = False) -> Iterator[str]:
    """Every name that a module imports, `a.b` for `from a import b`; relative ones resolved.

    Args:
        module: Its dotted name, a package's as `package.__init__`.
        top_level: Whether to leave out what functions import when they are called.
    """
    nodes: list[ast.AST] = [ast.parse(FILES[module].read_text(encoding='utf-8'))]
    while nodes:
        node = nodes.pop()
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split('.')[: -node.level] if node.level else []
            source = '.'.join([*base, node.module] if node.module else base)
            yield from (f'{source}.{alias.name}' for alias in node.names)


def within(name: str, package: str) -> bool:
    return f'{name}.'.startswith(f'{package}.')


def layer(name: str) -> int:
    return LAYERS[max((key for key in LAYERS if within(name, key)), key=len)]


def test_the_walk_sees_every_kind_of_import() -> None:
    found = set(imports('mmvig.kernels.__init__'))
    assert 'mmvig.kernels.bigla.bidirectional_gla' in found
    assert len(FILES) > 20


@modules
def test_imports_go_down(module: str) -> None:
    upward = [
        name
        for name in imports(module)
        if within(name, 'mmvig') and layer(name) > layer(module) and name != 'mmvig.kernels'
    ]
    assert not upward


@modules
def test_neither_the_library_nor_kernels_import_tools_or_tests(module: str) -> None:
    assert not [n for n in imports(module) if within(n, 'tools') or within(n, 'tests')]


@pytest.mark.parametrize('module', sorted(m for m in FILES if within(m, 'mmvig.kernels')))
def test_kernels_import_torch_and_triton_only(module: str) -> None:
    allowed = {'torch', 'triton', *sys.stdlib_module_names}
    foreign = [
        name
        for name in imports(module)
        if name.partition('.')[0] not in allowed and not within(name, 'mmvig.kernels')
    ]
    assert foreign in ([], ['mmvig.kernels'])


@pytest.mark.parametrize('module', sorted(FILES.keys() - ON_DEMAND))
def test_mmdet_and_mmseg_are_not_imported_at_module_level(module: str) -> None:
    direct = [
        name
        for name in imports(module, top_level=True)
        if within(name, 'mmdet') or within(name, 'mmseg')
    ]
    assert not direct
    assert not ON_DEMAND.intersection(imports(module, top_level=True))


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mmvig_imports_without_mmdet_and_mmseg() -> None:
    run_python(
        'import sys\n'
        "sys.modules['mmdet'] = sys.modules['mmseg'] = None\n"
        'import mmvig\n'
        'from mmengine.registry import MODELS\n'
        "MODELS.build(dict(type='ViG', arch='tiny'))"
    )


def test_importing_compiles_nothing_and_touches_no_device(tmp_path: Path) -> None:
    out = run_python(
        'import sys, torch, mmvig, mmvig.kernels\n'
        "print(torch.cuda.is_initialized(), 'torch.utils.cpp_extension' in sys.modules)",
        TRITON_CACHE_DIR=str(tmp_path / 'triton'),
        TORCH_EXTENSIONS_DIR=str(tmp_path / 'extensions'),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'inductor'),
    )
    assert out.split() == ['False', 'False']
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
