"""Overlap and NMS of rotated boxes against polygon clipping; NMS of lane lines."""

import math

import mmcv._ext as ext
import pytest
import torch
from mmcv.ops import box_iou_rotated, nms_rotated

from .checks import DTYPES, TOLERANCE, assert_close

Polygon = list[tuple[float, float]]


def _polygon(box: list[float]) -> Polygon:
    x, y, width, height, angle = box
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    halves = [(u * width / 2, v * height / 2) for u, v in corners]
    return [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in halves]


def _clip(polygon: Polygon, by: Polygon) -> Polygon:
    """Sutherland and Hodgman: cuts the polygon along one edge of the other after another."""
    for (ax, ay), (bx, by_) in zip(by, by[1:] + by[:1], strict=True):
        sides = [(bx - ax) * (y - ay) - (by_ - ay) * (x - ax) for x, y in polygon]
        cut: Polygon = []
        for i, (x, y) in enumerate(polygon):
            before = i - 1
            if (sides[i] >= 0) != (sides[before] >= 0):
                share = sides[before] / (sides[before] - sides[i])
                px, py = polygon[before]
                cut.append((px + share * (x - px), py + share * (y - py)))
            if sides[i] >= 0:
                cut.append((x, y))
        polygon = cut
    return polygon


def _area(polygon: Polygon) -> float:
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return sum(a[0] * b[1] - a[1] * b[0] for a, b in pairs) / 2


def _iou(a: list[float], b: list[float], mode: str = 'iou') -> float:
    shared = _area(_clip(_polygon(a), _polygon(b)))
    base = a[2] * a[3] + (b[2] * b[3] - shared if mode == 'iou' else 0)
    return shared / base


def _boxes(count: int) -> torch.Tensor:
    return torch.rand(count, 5) * torch.tensor([12, 12, 8, 8, 6.0]) + torch.tensor([0, 0, 1, 1, -3])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('mode', ['iou', 'iof'])
@pytest.mark.parametrize('clockwise', [True, False])
def test_overlaps(clockwise: bool, mode: str, dtype: torch.dtype, device: str) -> None:
    first, second = _boxes(9).to(dtype), _boxes(9).to(dtype)
    turn = torch.tensor([1, 1, 1, 1, 1 if clockwise else -1]).double()
    rows = [(t.double() * turn).tolist() for t in (first, second)]
    expected = torch.tensor([[_iou(a, b, mode) for b in rows[1]] for a in rows[0]]).double()
    assert expected.max() > 0.2 and (expected == 0).any()
    first, second = first.to(device), second.to(device)
    got = box_iou_rotated(first, second, mode, clockwise=clockwise)
    assert_close('pairs', got, expected, max(TOLERANCE[dtype], 1e-6))
    got = box_iou_rotated(first, second, mode, aligned=True, clockwise=clockwise)
    assert_close('aligned', got, expected.diag(), max(TOLERANCE[dtype], 1e-6))


def test_touching_and_equal_boxes() -> None:
    box = torch.tensor([[5.0, 5.0, 4.0, 2.0, 0.7]])
    assert box_iou_rotated(box, box).item() == pytest.approx(1, abs=1e-6)
    upright = torch.tensor([[0.0, 0, 4, 2, 0], [4.0, 0, 4, 2, 0], [0.0, 0, 2, 1, math.pi / 2]])
    overlaps = box_iou_rotated(upright, upright)
    assert overlaps[0, 1].item() == 0
    assert overlaps[0, 2].item() == pytest.approx(2 / 8, abs=1e-6)


@pytest.mark.parametrize('with_labels', [False, True])
def test_nms_rotated(with_labels: bool, device: str) -> None:
    boxes, scores = _boxes(40), (torch.randperm(40) + 1) / 41
    labels = torch.randint(0, 2, (40,)) if with_labels else None
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        rivals = kept if labels is None else [j for j in kept if labels[j] == labels[i]]
        if all(_iou(boxes[i].tolist(), boxes[j].tolist()) <= 0.2 for j in rivals):
            kept.append(i)
    assert 5 < len(kept) < 35
    if labels is not None:
        labels = labels.to(device)
    dets, indices = nms_rotated(boxes.to(device), scores.to(device), 0.2, labels)
    assert indices.tolist() == kept
    assert torch.equal(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[kept])


def test_line_nms(device: str) -> None:
    """Four lanes of 72 points: two close, one that shares no points with them, one apart."""
    lines = torch.zeros(4, 77)
    lines[:, 2] = torch.tensor([0, 0, 50 / 71, 0])
    lines[:, 4] = torch.tensor([40.0, 30.0, 20.0, 72.0])
    lines[:, 5:] = torch.tensor([100.0, 110.0, 100.0, 300.0])[:, None]
    scores = torch.tensor([0.6, 0.9, 0.5, 0.7])
    keep, count, parents = ext.line_nms_forward(lines.to(device), scores.to(device), 15.0, 4)
    assert count.item() == 3 and keep[:3].tolist() == [1, 3, 2]
    assert parents.tolist() == [1, 1, 3, 2]
    assert ext.line_nms_forward(lines.to(device), scores.to(device), 5.0, 4)[1].item() == 4
    assert ext.line_nms_forward(lines.to(device), scores.to(device), 5.0, 2)[1].item() == 2
