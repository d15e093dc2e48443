"""The points inside the bins of regions, and pooling over them, for the rarer RoI operators.

Shape legend: R regions, PH x PW bins of a region, GH x GW points of a bin, G = GH * GW, C channels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.mmcv_ext.numeric import vjp
from mmvig.mmcv_ext.sampling import corners_in_rows

# Some regions: which, their map (R,), y and x of their points (R, PH, PW, G), their validity.
Points = tuple[slice, Tensor, Tensor, Tensor, Tensor]


class Grid(NamedTuple):
    """Points of every bin along either axis, counted from the region's start, in pixels."""

    y: Tensor  # (R, PH, GH)
    x: Tensor  # (R, PW, GW)
    valid_y: Tensor  # (R, GH), bool: small regions have fewer points than the largest
    valid_x: Tensor  # (R, GW), bool

    def points_each(self) -> int:
        """Points of one region."""
        return self.y.shape[1] * self.x.shape[1] * self.y.shape[2] * self.x.shape[2]

    def points(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """y, x (R, PH, PW, G) and their validity (R, 1, 1, G) of some of the regions."""
        y, x = mesh(self.y[part], self.x[part])
        valid_y, valid_x = mesh(self.valid_y[part, None], self.valid_x[part, None])
        return y, x, valid_y & valid_x


def region_grid(height: Tensor, width: Tensor, bins: tuple[int, int], sampling_ratio: int) -> Grid:
    """Points of regions of the given extents (R,), pixels, cut into PH x PW bins.

    `sampling_ratio` is the number of points along each side of a bin. 0 takes one a pixel, rounded
    up; the largest region then sets GH and GW, which waits for the device.
    """
    y, valid_y = _axis_points(height, bins[0], sampling_ratio)
    x, valid_x = _axis_points(width, bins[1], sampling_ratio)
    return Grid(y, x, valid_y, valid_x)


def mesh(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, PH, GH) and (R, PW, GW) -> every pair of a bin, twice (R, PH, PW, G)."""
    shape = (*y.shape[:2], x.shape[1], y.shape[2], x.shape[2])
    y, x = y[:, :, None, :, None].expand(shape), x[:, None, :, None].expand(shape)
    return y.flatten(3), x.flatten(3)


def average(
    rows: Tensor,
    size: tuple[int, int],
    batch: Tensor,
    y: Tensor,
    x: Tensor,
    valid: Tensor,
) -> Tensor:
    """Means of feature maps over the points of bins.

    Args:
        rows: (B * H * W, C), the maps as `as_rows` gives them.
        size: (H, W).
        batch: (R,), int64, the map that each region lies in.
        y, x: (R, PH, PW, G), points.
        valid: (R, 1, 1, G), which of them count.

    Returns:
        (R, C, PH, PW), 0 where a bin has no points.
    """
    positions, weights = corners_in_rows(size, batch, y, x)
    counts = valid.to(weights.dtype)
    weights = weights * counts / counts.sum(3, keepdim=True).clamp(min=1)
    # A bin is a weighted bag of rows: summed as they are read, so no sample is ever stored.
    bags, shares = (t.movedim(0, -1).flatten(0, 2).flatten(1) for t in (positions, weights))
    pooled = F.embedding_bag(bags, rows, mode='sum', per_sample_weights=shares)
    return pooled.view(*y.shape[:3], -1).permute(0, 3, 1, 2)


def average_backward(parts: Iterable[Points], grads: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of the maps through sampling and `average`.

    Args:
        parts: All regions.
        grads: (R, C, PH, PW).
        shape: (B, C, H, W) of the maps.

    Returns:
        (B, C, H, W); deterministic where PyTorch is asked to be.
    """
    batch_size, channels, *size = shape
    rows = grads.new_zeros(batch_size * size[0] * size[1], channels)
    total = torch.zeros_like(rows)
    for part, batch, y, x, valid in parts:

        def pool(rows: Tensor, at: tuple[Tensor, ...] = (batch, y, x, valid)) -> Tensor:
            return average(rows, size, *at)

        # Linear in the maps: zeros do where their values are not known any more.
        total += vjp(pool, (rows,), grads[part])[0]
    return total.view(batch_size, *size, channels).permute(0, 3, 1, 2)


def maximum(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(R, PH, PW, G, C) -> the maximum over valid points and its index, both (R, C, PH, PW).

    A bin without valid points gives 0 and index -1.
    """
    best, index = values.masked_fill(~valid[..., None], -torch.inf).max(3)
    empty = ~valid.any(3)[..., None]
    best, index = best.masked_fill(empty, 0), index.masked_fill(empty, -1)
    return best.permute(0, 3, 1, 2), index.permute(0, 3, 1, 2)


def pick(positions: Tensor, index: Tensor) -> Tensor:
    """Positions (R, PH, PW, G) at `maximum`'s index -> (R, C, PH, PW); -1 where that is -1."""
    picked = positions.gather(3, index.clamp(min=0).movedim(1, 3)).movedim(3, 1)
    return picked.masked_fill(index < 0, -1)


def _axis_points(length: Tensor, bins: int, sampling_ratio: int) -> tuple[Tensor, Tensor]:
    bin_size = length / bins
    if sampling_ratio > 0:
        count = torch.full_like(length, sampling_ratio)
        most = sampling_ratio
    else:
        count = bin_size.ceil().clamp(min=0)
        most = max(1, int(count.max())) if len(count) else 1
    index = torch.arange(most, device=length.device)
    inner = (index + 0.5) / count.clamp(min=1)[:, None]
    bin_index = torch.arange(bins, device=length.device)[:, None]
    points = (bin_index + inner[:, None]) * bin_size[:, None, None]
    return points, index < count[:, None]
