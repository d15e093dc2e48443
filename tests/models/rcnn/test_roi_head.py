"""Assignment, samples, losses and gradients of the batched RoI head against mmdet's own."""

import copy
from collections.abc import Callable

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mmvig.datasets import PackedMasks

from .conftest import HEIGHT, WIDTH, metas, random_boxes, random_truths

COUNTS = (5, 0, 12)


def settings(cfg: ConfigDict, num: int = 10**4, pos_fraction: float = 1.0) -> dict:
    """The RoI head's config; every box is sampled by default, so that nothing is random."""
    cfg.train_cfg.rcnn.sampler.update(num=num, pos_fraction=pos_fraction)
    return {**cfg.roi_head, 'train_cfg': cfg.train_cfg.rcnn, 'test_cfg': cfg.test_cfg.rcnn}


def proposals(truths: list[InstanceData]) -> list[InstanceData]:
    """Some at random, some near the truths; a different number in each image."""
    near = [t.bboxes.repeat(3, 1) + torch.randint(-4, 5, (3 * len(t), 4)) for t in truths]
    return [
        InstanceData(bboxes=torch.cat([random_boxes(30 + 10 * i), n])) for i, n in enumerate(near)
    ]


def samples(truths: list[InstanceData], packed: bool) -> list:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    result = []
    for truth, meta in zip(truths, metas(*[(HEIGHT, WIDTH)] * len(truths)), strict=True):
        bitmaps = (torch.rand(len(truth), HEIGHT, WIDTH) < 0.5).numpy().astype('uint8')
        kind = PackedMasks.pack if packed else lambda b: BitmapMasks(b, HEIGHT, WIDTH)
        instances = InstanceData(**dict(truth.items()), masks=kind(bitmaps))
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = instances
        result.append(sample)
    return result


def losses_of(head: torch.nn.Module, x: list[Tensor], packed: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    truths = [random_truths(count) for count in COUNTS]
    boxes, batch = proposals(truths), samples(truths, packed)
    device = x[0].device
    return head.to(device).loss(x, [b.to(device) for b in boxes], [s.to(device) for s in batch])


@pytest.mark.parametrize('pos_weight', [-1, 2.0])
def test_losses_and_gradients(
    pos_weight: float, cfg: ConfigDict, build_pair: Callable, device: str
) -> None:
    cfg.train_cfg.rcnn.pos_weight = pos_weight
    ours = settings(copy.deepcopy(cfg))
    for part in ('bbox_roi_extractor', 'mask_roi_extractor'):
        cfg.roi_head[part].type = 'SingleRoIExtractor'
    cfg.roi_head.bbox_head.type = 'Shared2FCBBoxHead'
    cfg.roi_head.bbox_head.bbox_coder.type = 'DeltaXYWHBBoxCoder'
    cfg.roi_head.mask_head.type = 'FCNMaskHead'
    heads = build_pair('BatchedRoIHead', 'StandardRoIHead', ours, settings(cfg))
    sizes = [(HEIGHT // s, WIDTH // s) for s in (4, 8, 16, 32, 64)]
    x = [torch.randn(3, 64, *size, device=device) for size in sizes]
    results = []
    for head in heads:
        losses = losses_of(head, x, packed=head is heads[0])
        assert losses['loss_mask'] > 0 and losses['loss_bbox'] > 0
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        results.append((losses, [p.grad for p in head.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4 if device == 'cpu' else 2e-3, atol=1e-5)


@pytest.mark.parametrize('add_gt', [True, False])
def test_samples(add_gt: bool, cfg: ConfigDict, build_pair: Callable) -> None:
    """The share of positives is kept, and each has the truth that it overlaps."""
    cfg.train_cfg.rcnn.sampler.add_gt_as_proposals = add_gt
    ours, theirs = build_pair('BatchedRoIHead', 'StandardRoIHead', settings(cfg, 24, 0.25))
    truths = [random_truths(count) for count in COUNTS]
    boxes = proposals(truths)
    got = ours.sample([b.bboxes for b in boxes], truths)
    for own, truth, proposed in zip(got, truths, boxes, strict=True):
        expected = theirs.bbox_assigner.assign(InstanceData(priors=proposed.bboxes), truth)
        expected = theirs.bbox_sampler.sample(expected, InstanceData(priors=proposed.bboxes), truth)
        assert own.num_pos == expected.num_pos and own.num_neg == expected.num_neg
        assert own.pos_is_gt.sum() == 0 or add_gt
        assert torch.equal(own.pos_gt_bboxes, truth.bboxes[own.pos_assigned_gt_inds])
        assert torch.equal(own.pos_gt_labels, truth.labels[own.pos_assigned_gt_inds])
        from mmdet.structures.bbox import bbox_overlaps

        iou = bbox_overlaps(own.pos_priors, own.pos_gt_bboxes, is_aligned=True)
        assert (iou >= 0.5).all() or cfg.train_cfg.rcnn.assigner.match_low_quality
        assert own.priors.shape == expected.priors.shape


def test_everything_drawn_is_what_mmdet_draws(cfg: ConfigDict, build_pair: Callable) -> None:
    ours, theirs = build_pair('BatchedRoIHead', 'StandardRoIHead', settings(cfg))
    truths = [random_truths(count) for count in COUNTS]
    boxes = proposals(truths)
    for own, truth, proposed in zip(
        ours.sample([b.bboxes for b in boxes], truths), truths, boxes, strict=True
    ):
        instances = InstanceData(priors=proposed.bboxes)
        expected = theirs.bbox_assigner.assign(instances, truth)
        expected = theirs.bbox_sampler.sample(expected, instances, truth)
        for name in ('pos_priors', 'neg_priors', 'pos_gt_bboxes'):
            mine, other = getattr(own, name), getattr(expected, name)
            assert torch.equal(*(t.unique(dim=0) for t in (mine, other))), name
            assert mine.shape == other.shape
        assert own.avg_factor == expected.avg_factor


def test_another_sampler_is_refused(cfg: ConfigDict, build_pair: Callable) -> None:
    cfg.train_cfg.rcnn.sampler = dict(type='OHEMSampler', num=64, pos_fraction=0.25)
    head = {**cfg.roi_head, 'train_cfg': cfg.train_cfg.rcnn, 'test_cfg': cfg.test_cfg.rcnn}
    with pytest.raises(ValueError, match='RandomSampler, got OHEMSampler'):
        build_pair('BatchedRoIHead', 'StandardRoIHead', head)


def test_targets_that_cascades_refine_boxes_by(cfg: ConfigDict, build_pair: Callable) -> None:
    head, _ = build_pair('BatchedRoIHead', 'BatchedRoIHead', settings(cfg))
    truths = [random_truths(count) for count in COUNTS]
    sampled = head.sample([b.bboxes for b in proposals(truths)], truths)
    rois = torch.cat([torch.nn.functional.pad(s.priors, (1, 0)) for s in sampled])
    classes = cfg.roi_head.bbox_head.num_classes
    scores, deltas = torch.randn(len(rois), classes + 1), torch.randn(len(rois), 4 * classes)
    found = [
        part.loss_and_target(scores, deltas, rois, sampled, cfg.train_cfg.rcnn)
        for part in build_pair('BatchedBBoxHead', 'Shared2FCBBoxHead', cfg.roi_head.bbox_head)
    ]
    ours, theirs = (f['bbox_targets'][:2] for f in found)
    assert all(map(torch.equal, ours, theirs))
    torch.testing.assert_close(*(f['loss_bbox'] for f in found))


@pytest.mark.parametrize(
    'setting',
    [
        dict(reg_decoded_bbox=True),
        dict(with_reg=False),
        dict(num_classes=3, loss_cls=dict(type='SeesawLoss', num_classes=3)),
    ],
    ids=str,
)
def test_settings_of_mmdets_box_head_are_refused(
    setting: dict, cfg: ConfigDict, build_pair: Callable
) -> None:
    settings = {**cfg.roi_head.bbox_head, **setting}
    with pytest.raises(ValueError, match='use Shared2FCBBoxHead'):
        build_pair('BatchedBBoxHead', 'Shared2FCBBoxHead', settings)
