"""mmdet's and mmseg's own models on the stand-in: one training and one inference step each."""

from pathlib import Path

import pytest
import torch
from mmengine import Config
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData

mmdet = pytest.importorskip('mmdet', reason='mmdet is not installed')
mmseg = pytest.importorskip('mmseg', reason='mmseg is not installed')

DETECTORS = [
    'retinanet/retinanet_r18_fpn_1x_coco.py',
    'dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
]
SEGMENTORS = ['psanet/psanet_r50-d8_4xb4-80k_ade20k-512x512.py']
SIZE = 64


def _without_downloads(node: object) -> None:
    """No checkpoints; and batch normalisation that runs in one process, on a CPU."""
    if isinstance(node, dict):
        if (node.get('init_cfg') or {}).get('type') == 'Pretrained':
            node['init_cfg'] = None
        if 'pretrained' in node:
            node['pretrained'] = None
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
        for value in node.values():
            _without_downloads(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _without_downloads(value)


def _build(library: object, config: str, **data_preprocessor: object) -> torch.nn.Module:
    path = Path(library.__file__).parent / '.mim' / 'configs' / config
    if not path.exists():
        pytest.skip(f'this {library.__name__} ships no {config}')
    model = Config.fromfile(path).model
    _without_downloads(model)
    model.data_preprocessor.update(data_preprocessor)
    model = library.registry.MODELS.build(model)
    model.init_weights()  # some parameters hold whatever was in memory before
    return model


def _train_step(model: torch.nn.Module, data: dict) -> None:
    model.train()
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    loss.backward()
    assert loss.isfinite() and loss > 0
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # A level that no box falls on leaves its share of a head idle; the backbone never is.
    assert not [name for name in missing if name.startswith('backbone')], missing


def _predict(model: torch.nn.Module, data: dict) -> list:
    model.eval()
    with torch.no_grad():
        return model(**model.data_preprocessor(data, False), mode='predict')


@pytest.mark.parametrize('config', DETECTORS)
def test_detector(config: str) -> None:
    import mmdet.models
    from mmdet.testing import demo_mm_inputs

    def data(count: int) -> dict:
        shapes, items = [[3, SIZE, SIZE]] * count, [2] * count
        return demo_mm_inputs(count, shapes, num_items=items, num_classes=3, with_mask=True)

    with DefaultScope.overwrite_default_scope('mmdet'):
        model = _build(mmdet, config)
        _train_step(model, data(2))
        (result,) = _predict(model, data(1))
    instances = result.pred_instances
    assert instances.bboxes.shape == (len(instances.scores), 4)
    assert instances.scores.isfinite().all()


@pytest.mark.parametrize('config', SEGMENTORS)
def test_segmentor(config: str) -> None:
    import mmseg.models
    from mmseg.structures import SegDataSample

    def data(count: int) -> dict:
        samples = []
        for _ in range(count):
            shape = (SIZE, SIZE)
            sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape))
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, SIZE, SIZE)))
            samples.append(sample)
        images = list(torch.randint(0, 255, (count, 3, SIZE, SIZE), dtype=torch.uint8))
        return dict(inputs=images, data_samples=samples)

    with DefaultScope.overwrite_default_scope('mmseg'):
        model = _build(mmseg, config, size=(SIZE, SIZE))
        _train_step(model, data(2))
        (result,) = _predict(model, data(1))
    assert result.pred_sem_seg.data.shape == (1, SIZE, SIZE)


def test_model_registries_import() -> None:
    """Every module of both libraries' models, and with them every operator that they look up."""
    import mmdet.models
    import mmseg.models

    assert len(mmdet.registry.MODELS) > 250 and len(mmseg.registry.MODELS) > 90
