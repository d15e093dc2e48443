"""The operators from their formulas, point by point in plain loops; slow, and only for tests.

Gradients come from autograd through the loops. Nothing here calls torchvision or mmvig.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _floor(value: float | Tensor) -> int:
    return math.floor(value.detach() if isinstance(value, Tensor) else value)


def clamped_bilinear(plane: Tensor, y: float | Tensor, x: float | Tensor) -> Tensor:
    """mmcv's rule for RoIs: the border's value up to one pixel outside, 0 further out."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return plane.new_zeros(())
    y, x = (v if v > 0 else v * 0 for v in (y, x))
    top, left = _floor(y), _floor(x)
    if top >= height - 1:
        top, y = height - 1, height - 1
    if left >= width - 1:
        left, x = width - 1, width - 1
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
    lower = plane[bottom, left] * (1 - dx) + plane[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def zero_padded_bilinear(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The rule of convolutions: everything outside is 0."""
    height, width = plane.shape
    top, left = _floor(y), _floor(x)
    total = plane.new_zeros(())
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                total = total + share * plane[row, column]
    return total


def _bin_points(start: float, length: float, bins: int, index: int, ratio: int) -> list[float]:
    size = length / bins
    count = ratio if ratio > 0 else math.ceil(size)
    return [start + index * size + (i + 0.5) * size / count for i in range(count)]


def roi_align(
    maps: Tensor, rois: Tensor, size: tuple, scale: float, ratio: int, mode: str, aligned: bool
) -> Tensor:
    shift = 0.5 if aligned else 0.0
    out = []
    for roi in rois.tolist():
        x1, y1, x2, y2 = (v * scale - shift for v in roi[1:])
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        for plane in maps[int(roi[0])]:
            for i in range(size[0]):
                for j in range(size[1]):
                    values = [
                        clamped_bilinear(plane, y, x)
                        for y in _bin_points(y1, height, size[0], i, ratio)
                        for x in _bin_points(x1, width, size[1], j, ratio)
                    ]
                    stacked = torch.stack(values) if values else maps.new_zeros(1)
                    out.append(stacked.mean() if mode == 'avg' else stacked.max())
    return torch.stack(out).view(len(rois), maps.shape[1], *size)


def roi_align_rotated(
    maps: Tensor, rois: Tensor, size: tuple, scale: float, ratio: int, aligned: bool, cw: bool
) -> Tensor:
    shift = 0.5 if aligned else 0.0
    out = []
    for index, cx, cy, width, height, angle in rois.tolist():
        cx, cy, width, height = (
            cx * scale - shift,
            cy * scale - shift,
            width * scale,
            height * scale,
        )
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        cos, sin = math.cos(angle), math.sin(-angle if cw else angle)
        for plane in maps[int(index)]:
            for i in range(size[0]):
                for j in range(size[1]):
                    values = [
                        clamped_bilinear(plane, cy + v * cos - u * sin, cx + v * sin + u * cos)
                        for v in _bin_points(-height / 2, height, size[0], i, ratio)
                        for u in _bin_points(-width / 2, width, size[1], j, ratio)
                    ]
                    out.append(torch.stack(values).mean())
    return torch.stack(out).view(len(rois), maps.shape[1], *size)


def deform_roi_pool(
    maps: Tensor, offset: Tensor, rois: Tensor, size: tuple, scale: float, ratio: int, gamma: float
) -> Tensor:
    out = []
    for r, roi in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (v * scale - 0.5 for v in roi[1:])
        width, height = x2 - x1, y2 - y1
        for plane in maps[int(roi[0])]:
            for i in range(size[0]):
                for j in range(size[1]):
                    move_x = gamma * width * offset[r, 0, i, j]
                    move_y = gamma * height * offset[r, 1, i, j]
                    values = [
                        clamped_bilinear(plane, y + move_y, x + move_x)
                        for y in _bin_points(y1, height, size[0], i, ratio)
                        for x in _bin_points(x1, width, size[1], j, ratio)
                    ]
                    out.append(torch.stack(values).mean())
    return torch.stack(out).view(len(rois), maps.shape[1], *size)


def roi_pool(maps: Tensor, rois: Tensor, size: tuple, scale: float) -> Tensor:
    height, width = maps.shape[2:]
    out = []
    for roi in rois.tolist():
        x1, y1, x2, y2 = roi[1] * scale, roi[2] * scale, (roi[3] + 1) * scale, (roi[4] + 1) * scale
        bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
        for plane in maps[int(roi[0])]:
            for i in range(size[0]):
                for j in range(size[1]):
                    rows = slice(*_clip(i * bin_h + y1, (i + 1) * bin_h + y1, height))
                    columns = slice(*_clip(j * bin_w + x1, (j + 1) * bin_w + x1, width))
                    pixels = plane[rows, columns]
                    empty = pixels.numel() == 0 or x2 <= x1 or y2 <= y1
                    out.append(maps.new_zeros(()) if empty else pixels.max())
    return torch.stack(out).view(len(rois), maps.shape[1], *size)


def _clip(first: float, last: float, size: int) -> tuple[int, int]:
    return min(max(math.floor(first), 0), size), min(max(math.ceil(last), 0), size)


def border_align(maps: Tensor, boxes: Tensor, pool_size: int) -> Tensor:
    channels = maps.shape[1] // 4
    out = []
    for b in range(len(maps)):
        for c in range(channels):
            for x1, y1, x2, y2 in boxes[b].tolist():
                dx, dy = (x2 - x1) / pool_size, (y2 - y1) / pool_size
                starts = ((x1, y1, dx, 0), (x1, y1, 0, dy), (x2, y2, -dx, 0), (x2, y2, 0, -dy))
                for side, (x, y, step_x, step_y) in enumerate(starts):
                    plane = maps[b, side * channels + c]
                    points = range(pool_size + 1)
                    values = [
                        clamped_bilinear(plane, y + i * step_y, x + i * step_x) for i in points
                    ]
                    out.append(torch.stack(values).max())
    return torch.stack(out).view(len(maps), channels, boxes.shape[1], 4)


def deform_conv(
    image: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    batch, channels = image.shape[:2]
    out_channels, in_group, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kernel_h * kernel_w
    out = []
    for b in range(batch):
        for o in range(out_channels):
            for row in range(out_h):
                for column in range(out_w):
                    total = image.new_zeros(()) if bias is None else bias[o]
                    for c in range(in_group):
                        source = o // (out_channels // groups) * in_group + c
                        group = source // (channels // deform_groups)
                        for tap in range(taps):
                            at = group * taps + tap
                            dy, dx = offset[b, 2 * at : 2 * at + 2, row, column]
                            y = row * stride - padding + tap // kernel_w * dilation + dy
                            x = column * stride - padding + tap % kernel_w * dilation + dx
                            value = zero_padded_bilinear(image[b, source], y, x)
                            if mask is not None:
                                value = value * mask[b, at, row, column]
                            total = total + value * weight[o, c, tap // kernel_w, tap % kernel_w]
                    out.append(total)
    return torch.stack(out).view(batch, out_channels, out_h, out_w)


def ms_deform_attn(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> Tensor:
    batch, _, heads, dims = value.shape
    queries, _, _, points = locations.shape[1:5]
    out = []
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                for d in range(dims):
                    total, start = value.new_zeros(()), 0
                    for level, (height, width) in enumerate(shapes):
                        plane = value[b, start : start + height * width, h, d].view(height, width)
                        start += height * width
                        for p in range(points):
                            x, y = locations[b, q, h, level, p]
                            sample = zero_padded_bilinear(plane, y * height - 0.5, x * width - 0.5)
                            total = total + weights[b, q, h, level, p] * sample
                    out.append(total)
    return torch.stack(out).view(batch, queries, heads * dims)


def sigmoid_focal_loss(
    logits: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None
) -> Tensor:
    rows = []
    for row, label in zip(logits, target.tolist(), strict=True):
        for c, logit in enumerate(row):
            p = torch.sigmoid(logit)
            right, factor = (p, alpha) if c == label else (1 - p, 1 - alpha)
            loss = -factor * (1 - right) ** gamma * torch.log(right)
            known = weight is not None and 0 <= label < len(weight)
            rows.append(loss * weight[label] if known else loss)
    return torch.stack(rows).view_as(logits)


def softmax_focal_loss(
    logits: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None
) -> Tensor:
    losses = []
    for row, label in zip(logits, target.tolist(), strict=True):
        if not 0 <= label < len(row):
            losses.append(row.sum() * 0)
            continue
        p = row[label].exp() / row.exp().sum()
        loss = -alpha * (1 - p) ** gamma * torch.log(p)
        losses.append(loss if weight is None else loss * weight[label])
    return torch.stack(losses)


def iou(a: Sequence[float], b: Sequence[float], offset: int) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    overlap = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


def nms(boxes: list, scores: list, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def soft_nms(
    boxes: list,
    scores: list,
    threshold: float,
    sigma: float,
    least: float,
    method: str,
    offset: int,
) -> tuple[list[int], list[float]]:
    left, kept, kept_scores = dict(enumerate(scores)), [], []
    while left:
        best = max(left, key=left.get)
        kept.append(best)
        kept_scores.append(left.pop(best))
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[i] *= 1 - overlap if method == 'linear' else 0
            if left[i] < least:
                del left[i]
    return kept, kept_scores


def nms_match(boxes: list, scores: list, threshold: float) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        owner = next((g for g in groups if iou(boxes[g[0]], boxes[i], 0) >= threshold), None)
        if owner is None:
            groups.append([i])
        else:
            owner.append(i)
    return groups


def carafe(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    batch, channels, height, width = features.shape
    radius = kernel // 2
    out = []
    for b in range(batch):
        for c in range(channels):
            first = c // (channels // groups) * kernel * kernel
            for y in range(height * scale):
                for x in range(width * scale):
                    total = features.new_zeros(())
                    for tap in range(kernel * kernel):
                        row = y // scale + tap // kernel - radius
                        column = x // scale + tap % kernel - radius
                        if 0 <= row < height and 0 <= column < width:
                            total = (
                                total + features[b, c, row, column] * masks[b, first + tap, y, x]
                            )
                    out.append(total)
    return torch.stack(out).view(batch, channels, height * scale, width * scale)


def psa_mask(masks: Tensor, psa_type: str, size: tuple[int, int]) -> Tensor:
    batch, _, height, width = masks.shape
    out = masks.new_zeros(batch, height, width, height, width)
    for y in range(height):
        for x in range(width):
            for i in range(size[0]):
                for j in range(size[1]):
                    row, column = y + i - (size[0] - 1) // 2, x + j - (size[1] - 1) // 2
                    if 0 <= row < height and 0 <= column < width:
                        value = masks[:, i * size[1] + j, y, x]
                        if psa_type == 'collect':
                            out[:, row, column, y, x] = value
                        else:
                            out[:, y, x, row, column] = value
    return out.flatten(1, 2)
