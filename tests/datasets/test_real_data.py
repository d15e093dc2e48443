"""The dataset bases on real images, where a copy of them is at hand."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from mmvig.datasets import check_data

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / 'shared' / 'data'


def config(path: str, scope: str, data_root: Path) -> Config:
    if not data_root.is_dir():
        pytest.skip(f'no real images at {data_root}')
    pytest.importorskip(scope)
    cfg = Config.fromfile(ROOT / 'configs' / path)
    cfg.default_scope = scope
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.data_root = str(data_root)
    return cfg


def first_sample(cfg: Config, loader: str, count: int) -> dict:
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg[loader].dataset)
        assert len(dataset) == count
        return dataset[0]


def test_coco():
    cfg = config('detection/_base_/datasets/coco_instance.py', 'mmdet', DATA / 'coco100')
    annotations = str(DATA / 'coco100/annotations/instances_val2017.json')
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = annotations
    check_data(cfg)
    sample = first_sample(cfg, 'val_dataloader', 100)
    assert max(sample['inputs'].shape) <= 1333
    assert min(sample['inputs'].shape[1:]) <= 800
    # Two of the hundred training images have no objects, and filter_empty_gt drops them.
    with DefaultScope.overwrite_default_scope('mmdet'):
        train = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(train) == 98
    labels = {int(i) for n in range(20) for i in train[n]['data_samples'].gt_instances.labels}
    assert len(labels) > 10
    assert max(labels) < 80


def test_camvid():
    cfg = config('segmentation/_base_/datasets/camvid.py', 'mmseg', DATA / 'camvid')
    check_data(cfg)
    train = first_sample(cfg, 'train_dataloader', 367)
    assert all(
        ours <= crop for ours, crop in zip(train['inputs'].shape[1:], (352, 480), strict=True)
    )
    val = first_sample(cfg, 'val_dataloader', 101)
    assert val['inputs'].shape == (3, 360, 480)
    ids = set(val['data_samples'].gt_sem_seg.data.unique().tolist())
    assert len(ids) > 3
    assert ids <= {*range(11), 255}
