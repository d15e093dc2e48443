"""Boxes of a whole batch: padded to one tensor, their overlaps, greedy suppression.

Shape legend: B images, M and N boxes of an image, P groups of boxes. Boxes are x1, y1, x2, y2 in
pixels, float32.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torchvision
from torch import Tensor

# Elements of the largest intermediate: 128 MiB in float32.
CHUNK_ELEMENTS = 1 << 25
# Pixels; RoIAlign is 0 for a region this far outside of a map, on every level.
OUTSIDE = -1e4
# Boxes of a group that are suppressed by a kernel; so many take 2 MiB.
_KERNEL_BOXES = 4096
_TINY_AREA = 1e-6


def pad_rows(rows: Sequence[Tensor], fill: float = 0) -> tuple[Tensor, Tensor]:
    """Stacks tensors (N_b, ...) of the images, padded to the longest.

    Returns:
        The rows (B, N, ...), and which of them are real, (B, N), bool.
    """
    lengths = [len(r) for r in rows]
    longest = max(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    device = padded.device
    counts = torch.tensor(lengths).to(device, non_blocking=True)
    return padded, torch.arange(longest, device=device) < counts[:, None]


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of (..., M, 4) and (..., N, 4), as (..., M, N).

    In mmdet's order of operations, so that results are the same to the last bit.
    """
    a, b = first[..., :, None, :], second[..., None, :, :]
    overlap = torch.minimum(a[..., 2], b[..., 2]).sub_(torch.maximum(a[..., 0], b[..., 0]))
    height = torch.minimum(a[..., 3], b[..., 3]).sub_(torch.maximum(a[..., 1], b[..., 1]))
    overlap.clamp_(min=0).mul_(height.clamp_(min=0))
    union = torch.add(_area(a), _area(b), out=height).sub_(overlap)
    return overlap.div_(union.clamp_(min=_TINY_AREA))


def suppress(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression in every group by itself.

    Args:
        boxes: (P, N, 4), best first in each group.
        valid: (P, N), bool; the others neither suppress nor are kept.
        iou_threshold: A box goes when its IoU with a better kept one is greater.

    Returns:
        Which boxes are kept, (P, N), bool.
    """
    # The kernel's table has a bit for every pair: beyond this torchvision's, by group, is used.
    if boxes.is_cuda and boxes.shape[1] <= _KERNEL_BOXES and find_spec('triton'):
        from mmvig.models.rcnn.nms_kernels import greedy_nms

        return greedy_nms(boxes, valid, iou_threshold)
    return _suppress_by_group(boxes, valid, iou_threshold)


def _suppress_by_group(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    keep = torch.zeros_like(valid)
    for group, rows in enumerate(valid):
        (index,) = rows.nonzero(as_tuple=True)
        ranks = torch.arange(len(index), 0, -1, dtype=boxes.dtype, device=boxes.device)
        kept = torchvision.ops.nms(boxes[group, index], ranks, iou_threshold)
        keep[group, index[kept]] = True
    return keep


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
