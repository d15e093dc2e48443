"""Overlaps, suppression, assignment and drawing against torchvision's and mmdet's."""

import pytest
import torch
from mmengine.structures import InstanceData
from torchvision.ops import nms

from mmvig.models.rcnn import assign as module
from mmvig.models.rcnn.assign import MaxIoURule, RandomRule, assign, draw
from mmvig.models.rcnn.boxes import pad_rows, pairwise_iou, suppress

from .conftest import random_boxes


@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.7])
def test_suppress(threshold: float, device: str) -> None:
    boxes, valid = torch.stack([random_boxes(200) for _ in range(3)]), torch.rand(3, 200) < 0.8
    keep = suppress(boxes.to(device), valid.to(device), threshold).cpu()
    assert 3 < keep.sum() < valid.sum()
    for group in range(3):
        index = valid[group].nonzero()[:, 0]
        kept = nms(boxes[group, index], torch.arange(len(index), 0, -1.0), threshold)
        assert torch.equal(keep[group].nonzero()[:, 0], index[kept].sort().values)


@pytest.mark.gpu
@pytest.mark.parametrize('count', [2000, 4096, 5000])
def test_suppress_many(count: int) -> None:
    """As many as a level has, as a kernel takes, and more."""
    corner = torch.randint(0, 600, (2, count, 2))
    boxes = torch.cat([corner, corner + torch.randint(8, 200, (2, count, 2))], -1).float().cuda()
    keep = suppress(boxes, torch.ones(2, count, dtype=torch.bool, device='cuda'), 0.7)
    for own, kept in zip(boxes, keep, strict=True):
        scores = torch.arange(count, 0, -1.0, device='cuda')
        assert torch.equal(kept.nonzero()[:, 0], nms(own, scores, 0.7).sort().values)


@pytest.mark.parametrize('counts', [(3, 0, 5), (0, 0)])
def test_pad_rows(counts: tuple[int, ...]) -> None:
    rows = [torch.rand(count, 4) for count in counts]
    padded, real = pad_rows(rows, fill=-1)
    assert padded.shape == (len(counts), max(counts), 4)
    for row, own, mask in zip(rows, padded, real, strict=True):
        assert torch.equal(own[mask], row) and (own[~mask] == -1).all()


def test_pairwise_iou_is_mmdets() -> None:
    overlaps = pytest.importorskip('mmdet.structures.bbox').bbox_overlaps
    first, second = torch.rand(7, 4), torch.rand(9, 4)
    first[:, 2:] += first[:, :2]
    second[:, 2:] += second[:, :2]
    assert torch.equal(pairwise_iou(first, second), overlaps(first, second))


@pytest.mark.parametrize('low_quality', [True, False])
@pytest.mark.parametrize('chunk', [1 << 25, 1])
def test_assign(chunk: int, low_quality: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdet.models.task_modules import MaxIoUAssigner

    monkeypatch.setattr(module, 'CHUNK_ELEMENTS', chunk)
    assigner = MaxIoUAssigner(0.5, 0.3, 0.2, match_low_quality=low_quality)
    boxes = torch.stack([random_boxes(300) for _ in range(3)])
    truths = [random_boxes(count) for count in (9, 0, 4)]
    truths[0][3] = truths[0][1]  # twice the same: the last one wins what is forced
    got = assign(boxes, *pad_rows(truths), MaxIoURule.of(assigner))
    for own, index, iou, each in zip(boxes, got.index, got.iou, truths, strict=True):
        expected = assigner.assign(
            InstanceData(priors=own),
            InstanceData(bboxes=each, labels=torch.zeros(len(each), dtype=torch.long)),
        )
        assert torch.equal(index, expected.gt_inds)
        assert torch.equal(iou, expected.max_overlaps)
    assert {-1, 0, 1} <= set(got.index.unique().tolist())


@pytest.mark.parametrize(
    ('ub', 'positives', 'negatives'),
    # 64 in all, a quarter positive; images with 30, 3 and 0 positives, and with 5 negatives only
    [(-1, (16, 3, 0, 16), (48, 61, 64, 5)), (2, (16, 3, 0, 16), (32, 6, 2, 5))],
)
def test_draw(ub: int, positives: tuple[int, ...], negatives: tuple[int, ...]) -> None:
    index = torch.full((4, 200), -1)
    for row, (pos, neg) in enumerate([(30, 100), (3, 100), (0, 100), (30, 5)]):
        index[row, :pos] = torch.arange(1, pos + 1)
        index[row, 50 : 50 + neg] = 0
    picks = draw(index, RandomRule(64, 0.25, ub, False))
    assert picks.is_positive.sum(1).tolist() == list(positives)
    assert picks.is_negative.sum(1).tolist() == list(negatives)
    for row in range(4):
        chosen = picks.positive[row, picks.is_positive[row]]
        others = picks.negative[row, picks.is_negative[row]]
        assert (index[row, chosen] > 0).all() and (index[row, others] == 0).all()
        assert len(chosen.unique()) == len(chosen) and len(others.unique()) == len(others)


def test_draw_is_uniform() -> None:
    """Each of 20 candidates in 5 of 20 draws: 500 of 2000, give or take 5 deviations."""
    index = torch.ones(2000, 20, dtype=torch.long)
    picks = draw(index, RandomRule(10, 0.5, -1, False))
    counts = picks.positive.flatten().bincount(minlength=20)
    assert picks.is_positive.all() and (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
