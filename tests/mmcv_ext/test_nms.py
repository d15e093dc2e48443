import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, nms, nms_match, soft_nms

from . import reference


def _boxes(count: int) -> torch.Tensor:
    corner, size = torch.rand(count, 2) * 40, torch.rand(count, 2) * 20 + 4
    return torch.cat([corner, corner + size], 1)


def _scores(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ((torch.randperm(count) + 1) / (count + 1)).to(dtype)  # all different, in bf16 too


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('offset', [0, 1])
def test_nms(offset: int, dtype: torch.dtype, device: str) -> None:
    boxes, scores = _boxes(80).to(dtype), _scores(80, dtype)
    kept = reference.nms(boxes.tolist(), scores.tolist(), 0.3, offset)
    assert 10 < len(kept) < 70
    dets, indices = nms(boxes.to(device), scores.to(device), 0.3, offset=offset)
    assert indices.dtype == torch.long and indices.tolist() == kept
    assert torch.equal(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[kept])


def test_nms_mixed_dtypes(device: str) -> None:
    """Under autocast mmdet's boxes are float32 and its scores half precision."""
    boxes, scores = _boxes(50), _scores(50).half()
    kept = reference.nms(boxes.tolist(), scores.tolist(), 0.3, 0)
    assert nms(boxes.to(device), scores.to(device), 0.3)[1].tolist() == kept


def test_nms_threshold_is_exclusive() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # IoU 0.5 exactly
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5)[1].tolist() == [0, 1]
    assert len(nms_match(torch.cat([boxes, scores[:, None]], 1), 0.5)) == 1


def test_nms_score_threshold_and_limit() -> None:
    boxes, scores = _boxes(80), _scores(80)
    kept = [i for i in reference.nms(boxes.tolist(), scores.tolist(), 0.3, 0) if scores[i] > 0.5]
    result = nms(boxes, scores, 0.3, score_threshold=0.5, max_num=5)[1]
    assert result.tolist() == kept[:5]


def test_batched_nms_keeps_classes_apart(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1).to(device)
    scores = torch.tensor([0.5, 0.9, 0.7, 0.6], device=device)
    classes = torch.tensor([0, 0, 1, 1], device=device)
    dets, kept = batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.5))
    assert kept.tolist() == [1, 2]
    assert torch.equal(dets[:, :4], boxes[:2])


@pytest.mark.parametrize('op', [nms, soft_nms])
def test_no_boxes(op: object) -> None:
    dets, kept = op(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms(method: str, offset: int) -> None:
    boxes, scores = _boxes(60), _scores(60)
    kept, decayed = reference.soft_nms(
        boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, method, offset
    )
    assert 10 < len(kept) < 60
    dets, indices = soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert indices.tolist() == kept
    assert torch.equal(dets[:, :4], boxes[kept])
    np.testing.assert_allclose(dets[:, 4], decayed, rtol=1e-5)


def test_soft_nms_keeps_the_best_box_below_the_least_score() -> None:
    """mmcv compares with `min_score` only after a decay, so the best box always stays."""
    dets, kept = soft_nms(_boxes(5), torch.full((5,), 1e-4), min_score=1e-3)
    assert kept.tolist() == [0] and dets.shape == (1, 5)


def test_nms_match() -> None:
    boxes, scores = _boxes(60), _scores(60)
    expected = reference.nms_match(boxes.tolist(), scores.tolist(), 0.3)
    assert any(len(group) > 2 for group in expected)
    groups = nms_match(torch.cat([boxes, scores[:, None]], 1), 0.3)
    assert [group.tolist() for group in groups] == expected
