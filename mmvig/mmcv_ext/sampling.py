"""Bilinear sampling at free points of feature maps, with mmcv's rule at the border.

A point up to one pixel outside a map takes the border's value, one further out is 0. `grid_sample`
knows no such rule. Shape legend: B maps, C channels, R regions, K points of a region.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the largest intermediate; regions are worked off in chunks below it.
_CHUNK_ELEMENTS = 1 << 25


def chunks(count: int, elements_each: int) -> Iterator[slice]:
    """Slices of `range(count)` whose intermediates of `elements_each` stay within bounds."""
    step = max(1, _CHUNK_ELEMENTS // max(1, elements_each))
    return (slice(start, start + step) for start in range(0, count, step))


def corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each point.

    Args:
        y, x: (...), pixels; the centre of the first pixel is 0.
        height, width: Of the map.

    Returns:
        Flat positions in a map (4, ...), int64, and their weights (4, ...), 0 outside; the weights
        can be differentiated by y and x.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    top, left = top.long(), left.long()
    bottom, beside = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    up, to_left = 1 - down, 1 - right
    positions = [top * width + left, top * width + beside]
    positions += [bottom * width + left, bottom * width + beside]
    weights = torch.stack([up * to_left, up * right, down * to_left, down * right])
    return torch.stack(positions), weights * inside


def as_rows(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C): a pixel's channels side by side, so that points are rows."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def corners_in_rows(
    size: tuple[int, int], batch: Tensor, y: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The four pixels around each point, as rows of `as_rows`.

    Args:
        size: (H, W) of the maps.
        batch: (R,), int64, the map that each region lies in.
        y, x: (R, ...), pixels.

    Returns:
        Rows (4, R, ...), int64, and their weights (4, R, ...), as from `corners`.
    """
    positions, weights = corners(y, x, *size)
    start = batch * (size[0] * size[1])
    return positions + start.view(-1, *[1] * (y.dim() - 1)), weights


def sample(rows: Tensor, size: tuple[int, int], batch: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values (R, ..., C) of maps (as `as_rows` gives them) at points; arguments as above."""
    positions, weights = corners_in_rows(size, batch, y, x)
    values = rows.index_select(0, positions.flatten()).view(*positions.shape, -1)
    return (values * weights[..., None]).sum(0)
