"""check_pipelines.py: how it changes configs, its verdicts, and runs on tiny shapes."""

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config

from mmvig.datasets import ShapesSpec, ensure_shapes
from tests.tools.conftest import ROOT, TOOLS, run_tool

PIPELINES = [
    *(
        f'detection/vig_{arch}_{head}.py'
        for arch in ('t', 'h_t')
        for head in ('retinanet', 'atss', 'fasterrcnn', 'cascade', 'dino', 'mask2former')
    ),
    *(
        f'segmentation/vig_{arch}_{head}.py'
        for arch in ('t', 'h_t')
        for head in ('fpn', 'segformer', 'mask2former')
    ),
    'detection/vig_t_sfp_fasterrcnn.py',
    'segmentation/vig_t_linear.py',
]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import check_pipelines

    return check_pipelines


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes, which lie in CamVid's layout; in COCO's, too, under the names of its classes."""
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp('pipelines') / 'shapes'
    ensure_shapes(root, ShapesSpec(num_train=4, num_val=2, height=64, width=96))
    for split in ('train', 'val'):
        (root / f'{split}2017').symlink_to(root / 'img_dir' / split)
        instances = json.loads((root / f'annotations/instances_{split}.json').read_text())
        classes = CocoDataset.METAINFO['classes']
        instances['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
        target = root / f'annotations/instances_{split}2017.json'
        target.write_text(json.dumps(instances))
    return root


def arguments(root: Path, **changed: object) -> Namespace:
    settings = dict(
        data_root_coco=str(root),
        data_root_camvid=str(root),
        iterations=52,
        images=3,
        float32=False,
        cfg_options=None,
    )
    return Namespace(**(settings | changed))


@pytest.mark.parametrize('name', PIPELINES)
def test_every_pipeline_is_changed_to_the_data(name: str, tool, root: Path) -> None:
    from mmengine.registry import DATASETS, init_default_scope

    cfg = tool.load(arguments(root), str(ROOT / 'configs' / name))
    init_default_scope(cfg.default_scope)
    for stage, count in (('train', 3), ('val', 2)):
        data = DATASETS.build(cfg[f'{stage}_dataloader'].dataset)
        assert len(data) == count
        assert data[0]['data_samples'] is not None
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (52, 52)
    if cfg.default_scope == 'mmseg':
        assert '150' not in Config(cfg.model).pretty_text


def test_another_optimizer_leaves_no_settings(tool) -> None:
    cfg = Config.fromfile(ROOT / 'configs/detection/vig_t_retinanet.py')
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.01, momentum=0.9)
    tool.shorten(cfg, 20, float32=True)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=2e-4, weight_decay=0.05)


def row(losses: list[float], **changed: object) -> dict:
    found = dict(config='configs/detection/x.py', error=None, losses=losses, metrics={}, seconds=1)
    return found | changed


@pytest.mark.parametrize(
    ('found', 'fault'),
    [
        (row([3.0] * 5 + [1.0] * 5), None),
        (row([1.0] * 5 + [3.0] * 5), 'does not fall'),
        (row([3.0] * 9 + [float('nan')]), 'not finite'),
        (row([3.0] * 5 + [1.0] * 5, metrics=None), 'not evaluated'),
        (row([], error='RuntimeError: no'), 'RuntimeError: no'),
        (dict(config='configs/detection/x.py', error='BrokenProcessPool: died'), 'died'),
    ],
)
def test_verdicts(found: dict, fault: str | None, tool) -> None:
    assert (tool.find_fault(found) is None) == (fault is None)
    assert (fault or 'right') in tool.cells(found)[-1]


# Narrow backbone and head of any segmentor or detector with these settings; small images.
TINY = """
_base_ = {base!r}
arch = dict(embed_dims=48, depth=2, num_heads=3, mlp_dims=48, conv_act=True, out_act=True)
model = dict(backbone=dict(_delete_=True, type='ViG', arch=arch), {model})
{rest}
"""
DETECTOR = dict(
    base=str(ROOT / 'configs/detection/vig_t_sfp_fasterrcnn.py'),
    model="""
    neck=dict(in_channels=48, out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=32),
                  bbox_head=dict(in_channels=32, fc_out_channels=64))""",
    rest="""
small = dict(type='Resize', scale=(96, 64), keep_ratio=True)
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                  small, dict(type='PackDetInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
""",
)
SEGMENTOR = dict(
    base=str(ROOT / 'configs/segmentation/vig_t_linear.py'),
    model='decode_head=dict(in_channels=48, channels=48)',
    rest='',
)


def test_trains_evaluates_and_writes_tables(root: Path, tmp_path: Path) -> None:
    names = []
    for name, settings in (('detector', DETECTOR), ('segmentor', SEGMENTOR)):
        names.append(tmp_path / f'{name}.py')
        names[-1].write_text(TINY.format(**settings))
    roots = ['--data-root-coco', root, '--data-root-camvid', root]
    short = ['--iterations', 20, '--images', 1, '--jobs', 2]
    files = ['--json', 'found.json', '--markdown', 'found.md']
    options = ['--cfg-options', 'train_dataloader.batch_size=1']
    out = run_tool('check_pipelines.py', *names, *roots, *short, *files, *options, cwd=tmp_path)
    assert '2 of 2 trained and were evaluated' in out
    assert out.count(': 20 of 20 iterations') == 2
    rows = json.loads((tmp_path / 'found.json').read_text())['rows']
    assert sorted(Path(r['config']).stem for r in rows) == ['detector', 'segmentor']
    assert [len(r['losses']) for r in rows] == [20, 20]
    table = (tmp_path / 'found.md').read_text()
    assert table.index('/detector | ') < table.index('/segmentor | ')
    assert 'mIoU' in table and table.count('right |') == 2


def sleep(*args: object) -> None:
    time.sleep(60)


def die(*args: object) -> None:
    os._exit(3)


def die_before_a_child(*args: object) -> None:
    if os.fork():
        os._exit(3)
    time.sleep(100)


@pytest.mark.parametrize(
    ('send', 'timeout', 'error'),
    [
        (sleep, 0.2, 'not done after 0.2 s'),
        (die, 60, 'died with status 3'),
        (die_before_a_child, 80, 'died with status 3'),  # a busy machine starts slowly
    ],
)
def test_a_process_that_does_not_return(
    send: Callable, timeout: float, error: str, tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, '_send', send)
    found = tool.try_alone(Namespace(timeout=timeout), 'x.py')
    assert found['config'] == 'x.py' and error in found['error']


def test_mistakes_end_in_one_line(fail: Callable[..., str]) -> None:
    assert '--timeout must be positive, got 0.0' in fail(
        'check_pipelines.py', 'x.py', '--timeout', 0
    )
    assert '--iterations must be at least 20' in fail(
        'check_pipelines.py', 'x.py', '--iterations', 3
    )
