"""Dataset classes and the dataset bases of the configs, through mm's own registries and loaders."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner

import mmvig.datasets
from mmvig.datasets.shapes import CLASSES

CONFIGS = Path(__file__).parents[2] / 'configs'
BASES = {
    'detection/_base_/datasets/coco_instance.py': 'mmdet',
    'detection/_base_/datasets/shapes_instance.py': 'mmdet',
    'segmentation/_base_/datasets/ade20k.py': 'mmseg',
    'segmentation/_base_/datasets/camvid.py': 'mmseg',
    'segmentation/_base_/datasets/shapes_seg.py': 'mmseg',
}
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def load_base(path: str) -> Config:
    """A dataset base, its loaders without worker processes."""
    pytest.importorskip(BASES[path])
    cfg = Config.fromfile(CONFIGS / path)
    cfg.default_scope = BASES[path]
    for loader in LOADERS:
        cfg[loader].update(num_workers=0, persistent_workers=False)
    return cfg


def batches(cfg: Config, loader: str) -> list[dict]:
    """The first batches of a loader."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataloader = Runner.build_dataloader(cfg[loader], seed=0)
        return [batch for batch, _ in zip(dataloader, range(2), strict=False)]


def test_registering_imports_neither_mmdet_nor_mmseg():
    script = (
        'import sys; sys.modules["mmdet"] = sys.modules["mmseg"] = None; import mmvig.datasets; '
        'from mmengine.registry import DATASETS; assert "ShapesDetDataset" in DATASETS'
    )
    subprocess.run([sys.executable, '-c', script], check=True)


def test_classes_are_attributes_too():
    mmdet, mmseg = pytest.importorskip('mmdet.datasets'), pytest.importorskip('mmseg.datasets')
    assert issubclass(mmvig.datasets.ShapesDetDataset, mmdet.CocoDataset)
    assert issubclass(mmvig.datasets.ShapesSegDataset, mmseg.BaseSegDataset)
    assert issubclass(mmvig.datasets.CamVidDataset, mmseg.BaseSegDataset)
    with pytest.raises(AttributeError, match="no attribute 'Shapes'"):
        _ = mmvig.datasets.Shapes


@pytest.mark.parametrize('name', ['ShapesDetDataset', 'ShapesSegDataset'])
def test_argument_that_nothing_takes_is_refused(name: str, shapes_kwargs: dict):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    with pytest.raises(TypeError, match='data_rot'):
        DATASETS.build({'type': name, 'data_rot': 'x', **shapes_kwargs})
    with pytest.raises(TypeError, match='num_images'):
        DATASETS.build({'type': name, 'shapes': {'num_images': 3}})


def test_detection_dataset_creates_and_reads(tmp_path: Path):
    pytest.importorskip('mmdet')
    build = {
        'type': 'ShapesDetDataset',
        'data_root': str(tmp_path / 'shapes'),
        'shapes': {'num_train': 3, 'num_val': 2, 'height': 64, 'width': 96},
        'ann_file': 'annotations/instances_val.json',
        'data_prefix': {'img': 'img_dir/val/'},
    }
    lazy = DATASETS.build({**build, 'lazy_init': True})
    assert lazy.metainfo['classes'] == CLASSES
    assert not (tmp_path / 'shapes').exists()
    dataset = DATASETS.build(build)
    assert len(dataset) == 2
    info = dataset.get_data_info(0)
    assert Path(info['img_path']).is_file()
    assert (info['height'], info['width']) == (64, 96)
    assert 1 <= len(info['instances']) <= 5


@pytest.mark.parametrize('path', BASES)
def test_base_builds_every_loader(path: str):
    cfg = load_base(path)
    for loader in LOADERS:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            dataset = DATASETS.build({**cfg[loader].dataset, 'lazy_init': True})
        assert len(dataset.metainfo['classes']) == len(dataset.metainfo['palette'])
        assert len(dataset.pipeline.transforms) == len(cfg[loader].dataset.pipeline)


def test_detection_batches(shapes_kwargs: dict):
    cfg = load_base('detection/_base_/datasets/shapes_instance.py')
    for loader in LOADERS:
        cfg[loader].dataset.update(shapes_kwargs)
    train = batches(cfg, 'train_dataloader')
    assert [len(batch['inputs']) for batch in train] == [4, 1]
    for sample in train[0]['data_samples']:
        assert sample.gt_instances.labels.max() < len(CLASSES)
        assert sample.gt_instances.masks.to_ndarray().any(axis=(1, 2)).all()
    val = batches(cfg, 'val_dataloader')[0]['data_samples'][0]
    assert val.ori_shape == (96, 128)


def test_segmentation_batches(shapes_kwargs: dict):
    cfg = load_base('segmentation/_base_/datasets/shapes_seg.py')
    for loader in LOADERS:
        cfg[loader].dataset.update(shapes_kwargs)
    for batch in batches(cfg, 'train_dataloader'):
        assert torch.stack(batch['inputs']).shape == (4, 3, 96, 128)
        for sample in batch['data_samples']:
            ids = sample.gt_sem_seg.data.unique()
            assert ids[0] == 0
            assert len(ids) > 1
            assert ids[-1] <= len(CLASSES)


def test_truth_as_prediction_gives_box_and_mask_ap_of_1(shapes_kwargs: dict):
    cfg = load_base('detection/_base_/datasets/shapes_instance.py')
    dataset_cfg = {**cfg.val_dataloader.dataset, **shapes_kwargs, 'test_mode': True}
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(dataset_cfg)
        from mmdet.evaluation import CocoMetric
    metric = CocoMetric(ann_file=dataset.ann_file, metric=['bbox', 'segm'])
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples']
        truth = sample.gt_instances
        predicted = {
            'bboxes': truth.bboxes.tensor if hasattr(truth.bboxes, 'tensor') else truth.bboxes,
            'labels': truth.labels,
            'scores': torch.ones(len(truth.labels)),
            'masks': torch.from_numpy(truth.masks.masks.astype(bool)),
        }
        metric.process({}, [{**sample.to_dict(), 'pred_instances': predicted}])
    scores = metric.evaluate(len(dataset))
    assert scores['coco/bbox_mAP'] == scores['coco/segm_mAP'] == pytest.approx(1.0)


def test_truth_as_prediction_gives_iou_of_100(shapes_kwargs: dict):
    cfg = load_base('segmentation/_base_/datasets/shapes_seg.py')
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DATASETS.build({**cfg.val_dataloader.dataset, **shapes_kwargs})
        from mmseg.evaluation import IoUMetric
    metric = IoUMetric()
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples'].to_dict()
        metric.process({}, [{**sample, 'pred_sem_seg': sample['gt_sem_seg']}])
    scores = metric.evaluate(len(dataset))
    assert scores['mIoU'] == pytest.approx(100.0)
    assert np.isfinite(scores['aAcc'])
