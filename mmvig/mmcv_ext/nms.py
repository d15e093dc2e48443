"""Non-maximum suppression: greedy (torchvision's kernel), soft, and matching."""

import math

import numpy as np
import torch
import torchvision  # noqa: F401, registers torch.ops.torchvision
from torch import Tensor

from mmvig.mmcv_ext.numeric import wide


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy NMS with torchvision's kernel.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: A box goes when its IoU with a kept one is greater.
        offset: 0, or 1 where x2 and y2 lie on the box's last pixel.

    Returns:
        Indices of the kept boxes, best first, int64.
    """
    boxes, scores = wide(boxes, scores)
    if offset:
        # Widths and overlaps are all x2 - x1 + offset, so moving x2 and y2 says the same.
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft NMS (arXiv 1704.04503); mmcv calls it with CPU tensors.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        dets: (N, 5), written: kept boxes with their decayed scores, best first.
        iou_threshold: From this IoU on, methods 0 and 1 decay a score.
        sigma: Width of method 2.
        min_score: A box goes when its decayed score is smaller.
        method: 0 removes, 1 decays by `1 - IoU`, 2 by `exp(-IoU**2 / sigma)`.
        offset: As in `nms`.

    Returns:
        Indices of the kept boxes, in the order of `dets`, int64.
    """
    corners = boxes.detach().float().cpu().numpy()
    left = scores.detach().float().cpu().numpy().copy()
    alive = np.arange(len(left))
    kept, kept_scores = [], []
    while len(alive):
        best = left[alive].argmax()
        index = alive[best]
        kept.append(index)
        kept_scores.append(left[index])
        alive = np.delete(alive, best)
        iou = _iou(corners[index], corners[alive], offset)
        left[alive] *= _decay(iou, iou_threshold, sigma, method)
        alive = alive[left[alive] >= min_score]
    order = torch.tensor(kept, dtype=torch.long)
    if kept:
        rows = np.column_stack([corners[kept], kept_scores])
        dets[: len(kept)].copy_(torch.from_numpy(rows))
    return order.to(boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Greedy NMS that reports whom each kept box suppressed; mmcv calls it with CPU tensors.

    Args:
        dets: (N, 5), x1, y1, x2, y2, score.
        iou_threshold: A box goes when its IoU with a kept one is at least this.

    Returns:
        For each kept box, best first: its index, then those it suppressed, best first.
    """
    values = dets.detach().float().cpu()
    # torch's sort is what ranks equal scores in mmcv, too.
    alive = values[:, 4].sort(descending=True, stable=True).indices.numpy()
    corners = values[:, :4].numpy()
    groups = []
    while len(alive):
        index, alive = alive[0], alive[1:]
        suppressed = _iou(corners[index], corners[alive], offset=0) >= iou_threshold
        groups.append([int(index), *alive[suppressed].tolist()])
        alive = alive[~suppressed]
    return groups


def _iou(box: np.ndarray, boxes: np.ndarray, offset: int) -> np.ndarray:
    """IoU of one box (4,) with boxes (N, 4); NaN where both are empty, as in mmcv."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + offset
    overlap = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(axis=1)
    area = math.prod((box[2:] - box[:2] + offset).tolist())
    with np.errstate(invalid='ignore', divide='ignore'):
        return overlap / (area + areas - overlap)


def _decay(iou: np.ndarray, iou_threshold: float, sigma: float, method: int) -> np.ndarray:
    """Factors of the scores by the overlap with the box just kept."""
    if method == 2:
        return np.exp(-(iou**2) / sigma)
    return np.where(iou >= iou_threshold, 0.0 if method == 0 else 1 - iou, 1.0)
