"""Deformable RoI pooling: RoIAlign whose bins move, by bilinear sampling."""

import torch
from torch import Tensor

from mmvig.mmcv_ext.numeric import vjp, wide
from mmvig.mmcv_ext.roi_grid import Grid, average, region_grid
from mmvig.mmcv_ext.sampling import as_rows, chunks


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Deformable RoI pooling (arXiv 1703.06211, equation 5).

    Args:
        input: (B, C, H, W).
        rois: (R, 5), map index, x1, y1, x2, y2 in image pixels.
        offset: (R, 2, pooled_height, pooled_width), (x, y) shift of each bin in units of
            gamma times the region's width and height; or empty.
        output: (R, C, pooled_height, pooled_width), written.
        pooled_height, pooled_width: Bins of a region.
        spatial_scale: Map pixels for one image pixel.
        sampling_ratio: Points along each side of a bin; 0 takes one a pixel.
        gamma: Scale of the offsets.
    """
    maps, regions, shift = wide(input, rois, offset)
    regions, grid = _grid(regions, output.shape[2:], spatial_scale, sampling_ratio)
    rows = as_rows(maps)
    for part in chunks(len(regions), 4 * grid.points_each()):
        pooled = _pool(rows, shift[part], maps.shape[2:], regions[part], grid, part, gamma)
        output[part] = pooled.to(output.dtype)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Writes the gradients of `input` and `offset`; arguments as in the forward."""
    maps, regions, shift, grads = wide(input, rois, offset, grad_output)
    regions, grid = _grid(regions, grads.shape[2:], spatial_scale, sampling_ratio)
    size = maps.shape[2:]
    rows = as_rows(maps)
    grad_rows = torch.zeros_like(rows)
    for part in chunks(len(regions), 4 * grid.points_each()):

        def pool(rows: Tensor, shift: Tensor, part: slice = part) -> Tensor:
            return _pool(rows, shift, size, regions[part], grid, part, gamma)

        to_rows, to_shift = vjp(pool, (rows, shift[part]), grads[part])
        grad_rows += to_rows
        grad_offset[part] = to_shift.to(grad_offset.dtype)
    grad_input.copy_(grad_rows.view(len(maps), *size, -1).permute(0, 3, 1, 2))


def _grid(
    regions: Tensor, bins: tuple[int, int], spatial_scale: float, sampling_ratio: int
) -> tuple[Tensor, Grid]:
    """Regions (R, 5) with their corners in map pixels, and their points."""
    regions = torch.cat([regions[:, :1], regions[:, 1:] * spatial_scale - 0.5], dim=1)
    _, x1, y1, x2, y2 = regions.unbind(1)
    return regions, region_grid(y2 - y1, x2 - x1, bins, sampling_ratio)


def _pool(
    rows: Tensor,
    shift: Tensor,
    size: tuple[int, int],
    regions: Tensor,
    grid: Grid,
    part: slice,
    gamma: float,
) -> Tensor:
    """Pools the regions of one part, (R, C, PH, PW)."""
    y, x, valid = grid.points(part)
    batch, x1, y1, x2, y2 = regions[:, :, None, None, None].unbind(1)
    y, x = y + y1, x + x1
    if shift.numel():
        x = x + gamma * (x2 - x1) * shift[:, 0, ..., None]
        y = y + gamma * (y2 - y1) * shift[:, 1, ..., None]
    return average(rows, size, batch.flatten().long(), y, x, valid)
