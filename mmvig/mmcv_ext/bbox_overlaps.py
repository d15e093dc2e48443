"""IoU of axis-parallel boxes."""

import torch
from torch import Tensor

from mmvig.mmcv_ext.numeric import wide

_IOU = 0  # mmcv's mode; 1 divides by the first boxes' area


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Overlap of every box with every other, or pair by pair.

    Args:
        bboxes1: (M, 4), x1, y1, x2, y2.
        bboxes2: (N, 4); M = N where aligned.
        ious: (M, N), or (M,) where aligned; written.
        mode: 0 divides the overlap by the union, 1 by the area of the first box.
        aligned: Whether to go pair by pair.
        offset: 0, or 1 where x2 and y2 lie on the box's last pixel.
    """
    first, second = wide(bboxes1, bboxes2)
    if not aligned:
        first = first[:, None]
    sides = torch.minimum(first[..., 2:], second[..., 2:])
    sides = sides - torch.maximum(first[..., :2], second[..., :2]) + offset
    overlap = sides.clamp(min=0).prod(-1)
    base = (first[..., 2:] - first[..., :2] + offset).prod(-1)
    if mode == _IOU:
        base = base + (second[..., 2:] - second[..., :2] + offset).prod(-1) - overlap
    ious.copy_(overlap / base.clamp(min=offset))
