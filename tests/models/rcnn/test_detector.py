"""The whole Mask R-CNN with our parts and with mmdet's: losses, gradients, detections."""

import copy

import torch
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData

from mmvig.datasets import PackedMasks

from .conftest import HEIGHT, WIDTH, random_truths

SIZES = [(HEIGHT, WIDTH), (100, 130)]
THEIRS = {
    'data_preprocessor': 'DetDataPreprocessor',
    'rpn_head': 'RPNHead',
    'roi_head': 'StandardRoIHead',
    'rpn_head.bbox_coder': 'DeltaXYWHBBoxCoder',
    'roi_head.bbox_head': 'Shared2FCBBoxHead',
    'roi_head.bbox_head.bbox_coder': 'DeltaXYWHBBoxCoder',
    'roi_head.bbox_roi_extractor': 'SingleRoIExtractor',
    'roi_head.mask_roi_extractor': 'SingleRoIExtractor',
    'roi_head.mask_head': 'FCNMaskHead',
}


def detectors(cfg: ConfigDict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and mmdet's, with one set of weights; all boxes are sampled: nothing is random."""
    from mmdet.registry import MODELS

    cfg.train_cfg.rpn.sampler.update(num=10**6, pos_fraction=1.0)
    cfg.train_cfg.rcnn.sampler.update(num=10**4, pos_fraction=1.0)
    cfg.train_cfg.rpn_proposal.max_per_img = cfg.test_cfg.rpn.max_per_img = 40
    theirs = Config(copy.deepcopy(cfg))
    theirs.merge_from_dict({f'{path}.type': kind for path, kind in THEIRS.items()})
    pair = MODELS.build(cfg), MODELS.build(theirs._cfg_dict)
    assert [type(model.rpn_head).__name__ for model in pair] == ['BatchedRPNHead', 'RPNHead']
    pair[0].load_state_dict(pair[1].state_dict())
    return pair


def batch(packed: bool) -> dict:
    """Two images of different sizes, before the data preprocessor."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    torch.manual_seed(1)
    inputs, samples = [], []
    for (height, width), count in zip(SIZES, (5, 2), strict=True):
        inputs.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
        truth = random_truths(count)
        bitmaps = (torch.rand(count, height, width) < 0.7).numpy().astype('uint8')
        truth.masks = PackedMasks.pack(bitmaps) if packed else BitmapMasks(bitmaps, height, width)
        size = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=size)
        sample.gt_instances = truth
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def test_losses_and_gradients(cfg: ConfigDict, device: str) -> None:
    results = []
    for model in detectors(cfg):
        model.to(device).train()
        data = model.data_preprocessor(batch(packed=not results), training=True)
        loss, logged = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
        results.append((logged, [p.grad.norm() for p in model.parameters()]))
    assert results[0][0].keys() == results[1][0].keys()
    tolerance = 2e-4 if device == 'cpu' else 1e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance / 10)


def test_detections(cfg: ConfigDict) -> None:
    cfg.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)
    with torch.no_grad():
        ours, theirs = (model.eval().test_step(batch(packed=False)) for model in detectors(cfg))
    for got, expected in zip(ours, theirs, strict=True):
        assert len(got.pred_instances) == 20
        for name in ('bboxes', 'scores', 'labels', 'masks'):
            torch.testing.assert_close(got.pred_instances[name], expected.pred_instances[name])
