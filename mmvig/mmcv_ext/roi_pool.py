"""RoIPool in plain PyTorch: torchvision's kernel rounds the regions, mmcv's does not."""

import torch
from torch import Tensor

from mmvig.mmcv_ext.numeric import wide
from mmvig.mmcv_ext.roi_grid import maximum, mesh, pick
from mmvig.mmcv_ext.sampling import as_rows, chunks


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum of the pixels that each bin touches (arXiv 1504.08083, section 2.1).

    Args:
        input: (B, C, H, W).
        rois: (R, 5), map index, x1, y1, x2, y2 in image pixels, the last ones included.
        output: (R, C, pooled_height, pooled_width), written; 0 for a bin without pixels.
        argmax: Like output, int32, written with the maximum's flat position in its map, or -1.
        pooled_height, pooled_width: Bins of a region.
        spatial_scale: Map pixels for one image pixel.
    """
    maps, regions = wide(input, rois)
    height, width = maps.shape[2:]
    y1, x1 = regions[:, 2] * spatial_scale, regions[:, 1] * spatial_scale
    y2, x2 = (regions[:, 4] + 1) * spatial_scale, (regions[:, 3] + 1) * spatial_scale
    y, valid_y = _axis_pixels(y1, y2, pooled_height, height)
    x, valid_x = _axis_pixels(x1, x2, pooled_width, width)
    rows, batch = as_rows(maps), regions[:, 0].long()
    for part in chunks(len(regions), maps.shape[1] * y[:1].numel() * x[:1].numel()):
        pixels_y, pixels_x = mesh(y[part], x[part])
        positions = pixels_y * width + pixels_x
        in_batch = positions + (batch[part] * (height * width))[:, None, None, None]
        values = rows.index_select(0, in_batch.flatten()).view(*positions.shape, -1)
        in_rows, in_columns = mesh(valid_y[part], valid_x[part])
        best, index = maximum(values, in_rows & in_columns)
        output[part] = best.to(output.dtype)
        argmax[part] = pick(positions, index).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes the gradient of `input`; arguments as in the forward."""
    _, channels, height, width = grad_input.shape
    (grads,) = wide(grad_output)
    channel = torch.arange(channels, device=rois.device)[:, None, None]
    planes = rois[:, 0].long()[:, None, None, None] * channels + channel
    positions = planes * (height * width) + argmax.clamp(min=0)
    total = grads.new_zeros(grad_input.numel())
    total.index_add_(0, positions.flatten(), grads.masked_fill(argmax < 0, 0).flatten())
    grad_input.copy_(total.view_as(grad_input))


def _axis_pixels(start: Tensor, end: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """Pixels of each bin along one axis.

    Args:
        start, end: (R,), of the regions, pixels.
        bins: Bins along this axis.
        size: Of the map along this axis.

    Returns:
        Pixels (R, bins, G), int64, and which of them a bin has, bool; the largest bin sets G
        (which waits for the device).
    """
    length = (end - start)[:, None]
    index = torch.arange(bins, device=start.device)
    first = (index * (length / bins) + start[:, None]).floor().clamp(0, size).long()
    last = ((index + 1) * (length / bins) + start[:, None]).ceil().clamp(0, size).long()
    most = max(1, int((last - first).max())) if len(start) else 1
    pixels = first[..., None] + torch.arange(most, device=start.device)
    valid = (pixels < last[..., None]) & (length > 0)[..., None]
    return pixels.clamp(max=size - 1), valid
