"""NMS of lane lines (CLRNet)."""

import torch
from torch import Tensor

from mmvig.mmcv_ext.greedy import greedy_keep
from mmvig.mmcv_ext.numeric import wide

_HEAD = 5  # entries of a line before its points


def line_nms_forward(
    boxes: Tensor, scores: Tensor, thresh: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy NMS of lane lines by their mean distance (arXiv 2203.10350, section 3.4).

    Args:
        boxes: (N, 5 + P), entry 2 the start as a share of the P - 1 strips, entry 4 the number of
            points, from entry 5 on the x of each point.
        scores: (N,).
        thresh: A line goes when its mean distance to a kept one is smaller, over the points that
            both have.
        top_k: Lines to keep at most.

    Returns:
        Indices of the kept lines, best first, zeros behind them (N,); how many were kept (); for
        each line, the number of the last kept one that covers it, from 1, or 0 (N,). All int64.
    """
    order = scores.sort(descending=True).indices
    covers = _covers(wide(boxes)[0][order], thresh)
    positions = greedy_keep(covers)[:top_k]
    keep, parents = torch.zeros_like(order), torch.zeros_like(order)
    keep[: len(positions)] = order[positions]
    numbers = torch.arange(1, len(positions) + 1, device=order.device)
    itself_or_later = torch.arange(len(order), device=order.device) >= positions[:, None]
    owned = covers[positions] & itself_or_later
    owned[numbers - 1, positions] = True
    if len(positions):
        parents[order] = (owned * numbers[:, None]).amax(0)
    return keep, torch.tensor(len(positions), device=order.device), parents


def _covers(lines: Tensor, thresh: float) -> Tensor:
    """Which lines lie close to which, (N, N) bool."""
    points = lines.shape[1] - _HEAD
    start = (lines[:, 2] * (points - 1) + 0.5).long()
    end = start + lines[:, 4].long() - 1
    first = torch.maximum(start[:, None], start)
    last = torch.minimum(end[:, None], end).clamp(max=points - 1)
    total = torch.zeros_like(first, dtype=lines.dtype)
    for point in range(points):  # one at a time: all together they would be N * N * P
        x = lines[:, _HEAD + point]
        total += (x[:, None] - x).abs() * ((first <= point) & (point <= last))
    return (last >= first) & (first >= 0) & (total < thresh * (last - first + 1))
