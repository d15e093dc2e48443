"""RoIAlign of rotated regions, by bilinear sampling."""

from collections.abc import Iterator

from torch import Tensor

from mmvig.mmcv_ext.numeric import wide
from mmvig.mmcv_ext.roi_grid import Points, average, average_backward, region_grid
from mmvig.mmcv_ext.sampling import as_rows, chunks


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """RoIAlign with average pooling over rotated regions.

    Args:
        input: (B, C, H, W).
        rois: (R, 6), map index, centre x, centre y, width, height in image pixels, angle in radian.
        output: (R, C, pooled_height, pooled_width), written.
        pooled_height, pooled_width: Bins of a region.
        spatial_scale: Map pixels for one image pixel.
        sampling_ratio: Points along each side of a bin; 0 takes one a pixel.
        aligned: Whether pixel centres lie at half-integers.
        clockwise: Whether positive angles turn clockwise on the screen.
    """
    maps, regions = wide(input, rois)
    rows = as_rows(maps)
    args = (regions, output.shape[2:], spatial_scale, sampling_ratio, aligned, clockwise)
    for part, batch, y, x, valid in _points(*args):
        pooled = average(rows, maps.shape[2:], batch, y, x, valid)
        output[part] = pooled.to(output.dtype)


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Writes the gradient of `input`; arguments as in the forward."""
    grads, regions = wide(grad_output, rois)
    args = (regions, grads.shape[2:], spatial_scale, sampling_ratio, aligned, clockwise)
    grad_input.copy_(average_backward(_points(*args), grads, grad_input.shape))


def _points(
    regions: Tensor,
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> Iterator[Points]:
    """Yields the points of some regions at a time, so that samples stay within bounds."""
    batch = regions[:, 0].long()
    width, height = (regions[:, 3:5] * spatial_scale).unbind(1)
    if not aligned:  # mmcv's old convention: at least one pixel a side
        width, height = width.clamp(min=1), height.clamp(min=1)
    shift = 0.5 if aligned else 0
    centre_x, centre_y = (regions[:, 1:3] * spatial_scale - shift)[:, :, None, None, None].unbind(1)
    angle = (-regions[:, 5] if clockwise else regions[:, 5])[:, None, None, None]
    cos, sin = angle.cos(), angle.sin()
    grid = region_grid(height, width, bins, sampling_ratio)
    for part in chunks(len(regions), 4 * grid.points_each()):
        v, u, valid = grid.points(part)
        v = v - height[part, None, None, None] / 2
        u = u - width[part, None, None, None] / 2
        y = v * cos[part] - u * sin[part] + centre_y[part]
        x = v * sin[part] + u * cos[part] + centre_x[part]
        yield part, batch[part], y, x, valid
