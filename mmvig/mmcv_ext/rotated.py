"""Overlap and NMS of rotated boxes.

Boxes are (centre x, centre y, width, height, angle in radian), positive angles turn clockwise on
the screen. Shape legend: M, N boxes; the two corner points' axis is the last.
"""

import torch
from torch import Tensor

from mmvig.mmcv_ext.greedy import greedy_keep

_IOU = 0  # mmcv's mode_flag; 1 divides by the first boxes' area
_CHUNK_PAIRS = 1 << 18


def box_iou_rotated(
    boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool
) -> None:
    """Overlap of every rotated box with every other, or pair by pair, in float64.

    Args:
        boxes1: (M, 5).
        boxes2: (N, 5); M = N where aligned.
        ious: (M * N,), or (M,) where aligned; written.
        mode_flag: 0 divides the overlap by the union, 1 by the area of the first box.
        aligned: Whether to go pair by pair.
    """
    if aligned:
        ious.copy_(_overlap(boxes1, boxes2, mode_flag))
    else:
        ious.copy_(_pairwise(boxes1, boxes2, mode_flag).flatten())


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Greedy NMS of rotated boxes.

    Args:
        dets: (N, 5), or (N, 6) with the label last where `multi_label`.
        scores: (N,).
        order: (N,), int64, positions in `dets`, best first.
        dets_sorted: `dets[order]`.
        labels: Labels for other devices' kernels; here they come with the boxes.
        iou_threshold: A box goes when its IoU with a kept one is greater.
        multi_label: Whether boxes only suppress those of their label.

    Returns:
        Indices of the kept boxes, best first, int64.
    """
    boxes = dets_sorted[:, :5]
    suppresses = _pairwise(boxes, boxes, _IOU) > iou_threshold
    if multi_label:
        suppresses &= dets_sorted[:, None, 5] == dets_sorted[:, 5]
    return order[greedy_keep(suppresses)]


def _pairwise(boxes1: Tensor, boxes2: Tensor, mode_flag: int) -> Tensor:
    """(M, 5) and (N, 5) -> (M, N)."""
    step = max(1, _CHUNK_PAIRS // max(1, len(boxes2)))
    parts = [_overlap(part[:, None], boxes2, mode_flag) for part in boxes1.split(step)]
    return torch.cat(parts) if parts else boxes1.new_zeros(0, len(boxes2))


def _overlap(boxes1: Tensor, boxes2: Tensor, mode_flag: int) -> Tensor:
    """Overlap of broadcast boxes (..., 5)."""
    boxes1, boxes2 = torch.broadcast_tensors(boxes1.double(), boxes2.double())
    shared = _intersection_area(_corners(boxes1), _corners(boxes2))
    areas = boxes1[..., 2] * boxes1[..., 3], boxes2[..., 2] * boxes2[..., 3]
    base = areas[0] + areas[1] - shared if mode_flag == _IOU else areas[0]
    return torch.where(base > 0, shared / base, 0)


def _corners(boxes: Tensor) -> Tensor:
    """(..., 5) -> (..., 4, 2), (x, y) of the corners in order around the box."""
    centre, width, height = boxes[..., None, :2], boxes[..., 2], boxes[..., 3]
    cos, sin = boxes[..., 4].cos() / 2, boxes[..., 4].sin() / 2
    along = torch.stack([cos * width, sin * width], -1)
    across = torch.stack([-sin * height, cos * height], -1)
    return centre + torch.stack(
        [-along - across, along - across, along + across, across - along], -2
    )


def _intersection_area(first: Tensor, second: Tensor) -> Tensor:
    """Area shared by convex quadrilaterals (..., 4, 2), (...).

    Its corners are where edges cross and the corners of each that lie in the other; sorted by
    their angle around their mean, they bound it.
    """
    crossings, crossed = _crossings(first, second)
    points = torch.cat([crossings, first, second], -2)
    valid = torch.cat([crossed, _inside(first, second), _inside(second, first)], -1)
    # Points that are none repeat one that is, which adds no area.
    some = valid.to(torch.uint8).argmax(-1, keepdim=True)[..., None].expand(*valid.shape[:-1], 1, 2)
    points = torch.where(valid[..., None], points, points.gather(-2, some))
    points = points - points.mean(-2, keepdim=True)
    order = torch.atan2(points[..., 1], points[..., 0]).argsort(-1)
    points = points.gather(-2, order[..., None].expand(points.shape))
    return _cross(points, points.roll(-1, -2)).sum(-1).abs() / 2


def _crossings(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the edges' lines meet (..., 16, 2), and whether within both edges (..., 16)."""
    start1, edge1 = first[..., None, :], (first.roll(-1, -2) - first)[..., None, :]
    start2, edge2 = second[..., None, :, :], (second.roll(-1, -2) - second)[..., None, :, :]
    determinant = _cross(edge2, edge1)
    parallel = determinant.abs() <= 1e-14
    determinant = determinant.masked_fill(parallel, 1)
    between = start2 - start1
    t1, t2 = _cross(edge2, between) / determinant, _cross(edge1, between) / determinant
    within = (t1 >= 0) & (t1 <= 1) & (t2 >= 0) & (t2 <= 1) & ~parallel
    return (start1 + t1[..., None] * edge1).flatten(-3, -2), within.flatten(-2)


def _inside(points: Tensor, box: Tensor) -> Tensor:
    """Which of the points (..., 4, 2) lie in the rectangle with corners (..., 4, 2)."""
    origin = box[..., :1, :]
    offsets = points - origin
    inside = torch.ones_like(offsets[..., 0], dtype=torch.bool)
    for corner in (1, 3):
        side = box[..., corner : corner + 1, :] - origin
        share = (offsets * side).sum(-1)
        inside &= (share >= 0) & (share <= (side * side).sum(-1))
    return inside


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
